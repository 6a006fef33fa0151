"""Optimizer steps one after another, with one all-reduce of numbers and one wait for them in each.

What the ranks must tell one another in a step travels together, after its backward passes: whether
gradients are finite, the terms of the loss, what is counted in the micro-batches of the next step,
and whether a rank was asked to stop or to save.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dalle_dist.data.notes import Notes
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.interface import Engine
from dalle_dist.train.stage import Stage
from dalle_dist.watch.own_time import OwnTime


@dataclass
class _Read:
    """Micro-batches of one step on this rank, read ahead of it."""

    micro_batches: list[Any]
    counts: list[float]  # of this rank, then of all
    notes: Notes
    waited: float  # seconds


@dataclass(frozen=True)
class Made:
    """One optimizer step.

    numbers   of the loss, for the log
    norm      of the gradient: a tensor of no dimension, for which nobody has waited
    skipped   whether weights and moments are as they were
    suspects  micro-batches of this rank whose loss is not finite
    waited    seconds in which samples were waited for
    """

    numbers: dict[str, float]
    norm: Tensor
    skipped: bool
    suspects: list[int]
    waited: float


class OptimizerSteps:
    """Makes one step after another of a stage.

    Args:
        stream: of micro-batches, whose notes come to `incoming`.
        notes: what was amiss in the samples that were trained on.
        asked: whether this rank wants the run to stop, and to save.
        own: takes the time of what this rank does by itself.

    stopped  whether any rank does, as of the last step
    save     likewise
    """

    def __init__(
        self,
        stage: Stage,
        engine: Engine,
        ranks: Ranks,
        stream: Iterator[Any],
        incoming: Notes,
        notes: Notes,
        asked: Callable[[], tuple[bool, bool]],
        own: OwnTime,
    ) -> None:
        self._stage, self._engine, self._ranks = stage, engine, ranks
        self._stream, self._incoming, self._notes, self._asked = stream, incoming, notes, asked
        self._own = own
        self._next = self._read()
        *self._next.counts, stopped, save = ranks.sum([*self._next.counts, *map(float, asked())])
        self.stopped, self.save = stopped > 0, save > 0

    def make(self, step: int, lr: float, measure: bool, last: bool) -> Made:
        """Step number `step`, from 1; `last`: no further micro-batches are read."""
        read = self._next
        self._notes.add(read.notes)
        shares = [self._backward(one, read.counts, step, measure) for one in read.micro_batches]
        following = None if last else self._read()
        terms = torch.stack(shares).double().sum(0)
        counts = following.counts if following else []
        own = torch.tensor([*counts, *map(float, self._asked())], dtype=torch.float64)
        sums = torch.cat([terms, own.to(terms.device, non_blocking=True)])
        *totals, stopped, save = self._engine.reduce(sums, measure)
        self.stopped, self.save = stopped > 0, save > 0
        if following:
            following.counts = totals[len(terms) :]
            self._next = following
        norm = self._engine.apply(lr)
        self._own.add_step(read.waited)
        numbers = self._stage.numbers(totals[: len(terms)], step)
        suspects = [] if math.isfinite(numbers["loss"]) else _not_finite(shares)
        return Made(numbers, norm, self._engine.skipped, suspects, read.waited)

    def _backward(
        self, micro_batch: Any, counts: Sequence[float], step: int, measure: bool
    ) -> Tensor:
        with self._own:
            loss, shares = self._stage.loss(self._engine, micro_batch, counts, step)
        self._engine.backward(loss, hold=measure)
        return shares.detach()

    def _read(self) -> _Read:
        began = time.perf_counter()
        micro_batches = [next(self._stream) for _ in range(self._engine.accumulation)]
        waited = time.perf_counter() - began
        counts = list(self._stage.counts(micro_batches))
        return _Read(micro_batches, counts, self._incoming.take(), waited)


def _not_finite(shares: Sequence[Tensor]) -> list[int]:
    return [number for number, terms in enumerate(shares) if not bool(terms.isfinite().all())]
