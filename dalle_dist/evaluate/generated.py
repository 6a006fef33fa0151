"""Figures of generated images: rerank curves, blur, CLIP score, identification.

Shape suffixes: C captions, or colour channels of images, B of a chunk, H and W pixels, V values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle_dist.clip.scorer import CLIPScorer
from dalle_dist.evaluate.data import spread
from dalle_dist.evaluate.distances import Distances
from dalle_dist.evaluate.figures import Figure
from dalle_dist.evaluate.rows import gathered
from dalle_dist.evaluate.samples import Samples
from dalle_dist.evaluate.subject import Subject
from dalle_dist.evaluation.blur import RADII
from dalle_dist.evaluation.prepare import stack
from dalle_dist.evaluation.rerank import counts
from dalle_dist.metrics.identification import identify, summary

IDENTIFIED = 512  # captions of the identification, at most
CLIP_SCORE = "CLIP score"
OWN_JUDGE = "by the CLIP that chose the images: biased upwards"

Winners = Callable[[range], list[Image.Image]]  # images by their numbers
Rows = Callable[[range], Tensor]


def generated_figures(
    subject: Subject, samples: Samples, distances: Sequence[Distances]
) -> list[Figure]:
    """A collective call; the figures of rank 0 on all."""
    found: list[Figure] = []
    for network in distances:
        found += _distances(subject, samples, network)
    if subject.scorer is not None:
        found += _clip_scores(subject, samples, subject.scorer)
    for n in counts(subject.options.candidates):
        found += _identification(subject, samples, n)
    return found


def _distances(subject: Subject, samples: Samples, network: Distances) -> list[Figure]:
    """Of the best of 1, 2, 4 ... N as they are, then of the best of N by blur radius."""
    ranks, found = subject.ranks, list[Figure]()
    for n, rows in _by_count(subject, samples, lambda images, _: network.rows(images, 0)):
        found += ranks.on_main(partial(network.figures, rows, 0, candidates=n))
    best, everyone = subject.options.candidates, range(len(samples.captions))
    images = _winners(samples, everyone, samples.winners(best))
    for radius in RADII[1:]:
        rows = gathered(ranks, len(everyone), network.rows(images, radius))
        found += ranks.on_main(partial(network.figures, rows, radius, candidates=best))
    return found


def _by_count(
    subject: Subject, samples: Samples, rows_of: Callable[[Winners, Sequence[int]], Rows]
) -> Iterator[tuple[int, Tensor]]:
    """(n, rows_CV of the best of n) for 1, 2, 4 ... N; on ranks other than 0 no rows.

    From one n to the next only captions with another best image are looked at.

    Args:
        rows_of: of images by their number, and of the captions that they are of.
    """
    rows_CV, last = torch.empty(0), [-1] * len(samples.captions)
    for n in counts(subject.options.candidates):
        winners = samples.winners(n)
        changed = [c for c, winner in enumerate(winners) if winner != last[c]]
        images = _winners(samples, changed, winners)
        rows = gathered(subject.ranks, len(changed), rows_of(images, changed))
        if not len(rows_CV):
            rows_CV = rows
        elif changed:
            rows_CV[changed] = rows
        yield n, rows_CV
        last = winners


def _winners(samples: Samples, captions: Sequence[int], winners: Sequence[int]) -> Winners:
    """Images by their number among `captions`; `winners` are of all captions."""

    def images(numbers: range) -> list[Image.Image]:
        chosen = [captions[i] for i in numbers]
        return samples.images(chosen, [winners[caption] for caption in chosen])

    return images


def _clip_scores(subject: Subject, samples: Samples, scorer: CLIPScorer) -> list[Figure]:
    """Mean cosine of images and captions: of the best of 1, 2, 4 ... N, and of the true images."""
    texts, count = samples.captions, len(samples.captions)
    shared: dict[str, Any] = {
        "images": count,
        "network": scorer.name,
        "fingerprint": scorer.fingerprint,
        "preparation": subject.preparation.to_json(),
    }
    chose = subject.chooser is not None and subject.chooser.fingerprint == scorer.fingerprint

    def rows_of(images: Winners, captions: Sequence[int]) -> Rows:
        return lambda numbers: scorer.score(images(numbers), [texts[captions[i]] for i in numbers])

    def true(numbers: range) -> list[Image.Image]:
        return [subject.true(samples.numbers[i]) for i in numbers]

    found = []
    for n, scores_C in _by_count(subject, samples, rows_of):
        note = OWN_JUDGE if chose and n > 1 else ""
        value = _mean(subject, scores_C)
        found.append(Figure(CLIP_SCORE, value, "cosine", candidates=n, note=note, **shared))
    value = _mean(subject, gathered(subject.ranks, count, rows_of(true, range(count))))
    return [*found, Figure(f"{CLIP_SCORE} of the true images", value, "cosine", **shared)]


def _mean(subject: Subject, scores_C: Tensor) -> float:
    return subject.ranks.on_main(lambda: scores_C.double().mean().item())


def _identification(subject: Subject, samples: Samples, n: int) -> list[Figure]:
    """Shares of captions whose true image is nearest, or among the 10 nearest, pixel by pixel."""
    compared = spread(list(range(len(samples.captions))), IDENTIFIED)
    images = _winners(samples, compared, samples.winners(n))
    true_BCHW = stack([subject.true(samples.numbers[c]) for c in compared])

    def ranks_of(numbers: range) -> Tensor:
        # `identify` takes the first true image for the first generated one's own.
        return identify(stack(images(numbers)), true_BCHW.roll(-numbers.start, dims=0))

    ranks_B = gathered(subject.ranks, len(compared), ranks_of)
    found = subject.ranks.on_main(lambda: summary(ranks_B))
    shared: dict[str, Any] = {
        "images": len(compared),
        "candidates": n,
        "preparation": subject.preparation.to_json(),
    }
    return [
        Figure(f"identification R@{k}", found[f"r{k}"], note=_chance(k, len(compared)), **shared)
        for k in (1, 10)
    ]


def _chance(k: int, count: int) -> str:
    return f"chance: {min(1.0, k / count):.2g}"
