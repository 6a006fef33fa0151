"""Validation measures of stage 2 by name, the values of the config's `train.metrics`.

A new one is a function here, or in a file of its own, and one entry in METRICS. A forward pass of
the engine gives the sums and counts of both losses; what needs logits extends
`transformer/loss_model.py`, what needs samples asks `Evaluation.sampling_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from torch import Tensor

from dalle_dist.config import Config
from dalle_dist.data.token_dataset import TokenDataset, collate_tokens
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.interface import Engine
from dalle_dist.errors import ConfigError
from dalle_dist.image_tokenizer.protocol import ImageTokenizer
from dalle_dist.metrics.caption_gain import caption_cycle
from dalle_dist.metrics.completion import complete_images, completion_ranks, rows_kept
from dalle_dist.metrics.held_out import MOST, held_out_losses
from dalle_dist.metrics.identification import identify, sample_images, summary
from dalle_dist.transformer.protocol import TextImageTransformer
from dalle_dist.transformer.registry import build_transformer

MOST_IDENTIFIED = 64  # held-out captions of one evaluation that an image is sampled for


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: what measures look at, and what several of them need, found once.

    config           of the run
    image_tokenizer  on rank 0 on that rank's device; others do not decode
    """

    engine: Engine
    held_out: TokenDataset
    micro_batch: int
    ranks: Ranks
    config: Config
    image_tokenizer: ImageTokenizer

    @contextmanager
    def sampling_model(self) -> Iterator[TextImageTransformer | None]:
        """On rank 0 the model with the present weights, None elsewhere; a collective call."""
        with self.engine.sampling_model(lambda: build_transformer(self.config)) as model:
            yield cast("TextImageTransformer | None", model)

    @cached_property
    def losses(self) -> tuple[float, float]:
        """Nats per text token and per image token, each image with its own caption."""
        return self._losses(None)

    @cached_property
    def losses_shuffled(self) -> tuple[float, float]:
        """The same, each image with another's caption."""
        other = caption_cycle(min(MOST, len(self.held_out)), seed=0).tolist()
        return self._losses(other.__getitem__)

    def _losses(self, caption_of: Callable[[int], int] | None) -> tuple[float, float]:
        return held_out_losses(self.engine, self.held_out, self.micro_batch, self.ranks, caption_of)


# To numbers for the log; a collective call.
Metric = Callable[[Evaluation], dict[str, float]]


def losses(evaluation: Evaluation) -> dict[str, float]:
    """`held_out_text` and `held_out_image`: nats per token."""
    text, image = evaluation.losses
    return {"held_out_text": text, "held_out_image": image}


def caption_gain(evaluation: Evaluation) -> dict[str, float]:
    """`caption_gain`: nats per image token that the right captions are worth."""
    return {"caption_gain": evaluation.losses_shuffled[1] - evaluation.losses[1]}


def identification(evaluation: Evaluation) -> dict[str, float]:
    """`identification_r1` and `_r10`, shares, and `_rank`, a median: see `identification.py`.

    Of the first MOST_IDENTIFIED held-out captions, one image each, sampled on rank 0 by seeds that
    never change. The true image is what the image tokenizer decodes from the held-out codes: no
    image shards are needed, and what the tokenizer loses is not held against the transformer.
    """
    found = _sampled(evaluation, _identification_ranks)
    return {f"identification_{name}": value for name, value in found.items()}


def completion(evaluation: Evaluation) -> dict[str, float]:
    """`completion_r1` and `_r10`, shares, and `_rank`, a median: see `completion.py`.

    Of the same images as `identification`, in the same way.
    """
    found = _sampled(evaluation, _completion_ranks)
    return {f"completion_{name}": value for name, value in found.items()}


def _sampled(
    evaluation: Evaluation, ranks_of: Callable[[Evaluation, TextImageTransformer], Tensor]
) -> dict[str, float]:
    """`summary` of what rank 0 finds, on all ranks."""
    found: dict[str, float] = {}
    with evaluation.sampling_model() as model:
        if model is not None:
            found = summary(ranks_of(evaluation, model))
    return evaluation.ranks.broadcast(found)


def _identification_ranks(evaluation: Evaluation, model: TextImageTransformer) -> Tensor:
    text_BT, codes_BN, seeds = _identified(evaluation)
    generated_BCHW = sample_images(model, evaluation.image_tokenizer, text_BT, seeds)
    return identify(generated_BCHW, evaluation.image_tokenizer.decode(codes_BN).cpu())


def _completion_ranks(evaluation: Evaluation, model: TextImageTransformer) -> Tensor:
    text_BT, codes_BN, seeds = _identified(evaluation)
    tokenizer, rows = evaluation.image_tokenizer, rows_kept(evaluation.config)
    completed_BCHW = complete_images(model, tokenizer, text_BT, codes_BN, seeds, rows)
    true_BCHW = tokenizer.decode(codes_BN).cpu()
    return completion_ranks(completed_BCHW, true_BCHW, rows / tokenizer.grid)


def _identified(evaluation: Evaluation) -> tuple[Tensor, Tensor, list[int]]:
    """text_BT, codes_BN and seeds of the first held-out samples, on the rank's device."""
    count, device = min(MOST_IDENTIFIED, len(evaluation.held_out)), evaluation.ranks.device
    text_BT, codes_BN, _ = collate_tokens([evaluation.held_out[i] for i in range(count)])
    seeds = [evaluation.config.seed + i for i in range(count)]
    return text_BT.to(device), codes_BN.to(device), seeds


METRICS: dict[str, Metric] = {
    "losses": losses,
    "caption_gain": caption_gain,
    "identification": identification,
    "completion": completion,
}


def measure(names: Sequence[str], evaluation: Evaluation) -> dict[str, float]:
    """All metrics of these names. Raises ConfigError: no such metric."""
    check(names)
    found: dict[str, float] = {}
    for name in names:
        found |= METRICS[name](evaluation)
    return found


def check(names: Sequence[str]) -> None:
    """Raises ConfigError: no such metric."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"train.metrics: '{name}' is not one of {', '.join(METRICS)}")
