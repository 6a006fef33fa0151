"""Losses per modality over all pairs of the set, and what the right captions are worth.

Shape suffixes: B pairs, T text positions, N image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dalle_dist.evaluate.figures import Figure
from dalle_dist.evaluate.rows import SEQUENCES, gathered
from dalle_dist.evaluate.subject import Subject
from dalle_dist.generate.generator import Generator
from dalle_dist.metrics.caption_gain import caption_cycle

NATS_TEXT, NATS_IMAGE = "nats per text token", "nats per image token"


def loss_figures(subject: Subject, generator: Generator) -> list[Figure]:
    """A collective call; the figures of rank 0 on all."""
    rows = gathered(subject.ranks, len(subject.data), _sums(subject, generator), SEQUENCES)
    return subject.ranks.on_main(lambda: _figures(rows, len(subject.data), subject))


def _sums(subject: Subject, generator: Generator) -> Callable[[range], Tensor]:
    """One row of a chunk: text sum and count, image sum and count, image sum of other captions."""
    other = caption_cycle(len(subject.data), seed=0).tolist()
    captions = subject.data.captions

    def rows(numbers: range) -> Tensor:
        codes_BN = subject.image_tokenizer.encode(subject.originals(numbers))
        own = _losses(generator, [captions[i] for i in numbers], codes_BN)
        shuffled = _losses(generator, [captions[other[i]] for i in numbers], codes_BN)
        return torch.cat([own, shuffled[2:3]])[None]

    return rows


@torch.no_grad()
def _losses(generator: Generator, captions: list[str], codes_BN: Tensor) -> Tensor:
    length = generator.config.transformer.text_tokens
    ids = [generator.tokenizer.encode_padded(caption, length)[0] for caption in captions]
    loss = generator.model(torch.tensor(ids, device=codes_BN.device), codes_BN)
    sums = (loss.text_sum, loss.text_count, loss.image_sum, loss.image_count)
    return torch.tensor([float(value) for value in sums], dtype=torch.float64)


def _figures(rows: Tensor, count: int, subject: Subject) -> list[Figure]:
    text, texts, image, images, shuffled = rows.sum(dim=0).tolist()
    shared: dict[str, Any] = {"images": count, "preparation": subject.own_preparation.to_json()}
    found = [
        Figure("image loss", image / images, NATS_IMAGE, **shared),
        Figure("caption gain", (shuffled - image) / images, NATS_IMAGE, **shared),
    ]
    if texts:
        found.insert(0, Figure("text loss", text / texts, NATS_TEXT, **shared))
    return found
