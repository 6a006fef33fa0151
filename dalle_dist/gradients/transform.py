"""The gradient transforms between reduce-scatter and optimizer step, in their order.

Unscale each resblock (fp16), average between nodes (dense or PowerSGD), and decide what becomes of
the optimizer step when something is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dalle_dist.choices import Skip
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.gradients.batches import Batch, Batcher
from dalle_dist.gradients.finite import agree, broken_gradients
from dalle_dist.gradients.node_mean import NodeMean
from dalle_dist.gradients.piece import Block, Piece, ReadPieces
from dalle_dist.gradients.powersgd.sending import Sending
from dalle_dist.gradients.resblocks import Resblocks
from dalle_dist.gradients.scaling import BlockScaling, Telemetry


@dataclass(frozen=True)
class SkipDecision:
    """What the optimizer must not change; the same on every rank.

    skip    nothing may change
    frozen  names of parameters that may not change
    """

    skip: bool = False
    frozen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Early:
    """What the backward pass has begun to send; `addresses` are those of all gradients."""

    sending: Sending
    factor_K1: Tensor
    addresses: list[int]


class GradientTransform:
    """Unscaling and the mean between nodes, where a config asks for them.

    Args:
        skip: "step": a resblock whose gradient is not finite costs the whole optimizer step
            (paper 2.4); "block": it costs that resblock's part of it.
        apart: nodes train apart, and what is not finite on one must be known to all.
    """

    def __init__(
        self,
        resblocks: Resblocks,
        ranks: Ranks,
        skip: Skip = "step",
        scaling: BlockScaling | None = None,
        node_mean: NodeMean | None = None,
        apart: bool = False,
    ) -> None:
        self.scaling, self.node_mean = scaling, node_mean
        self.skipped = 0  # steps so far
        self._resblocks, self._ranks, self._skip, self._apart = resblocks, ranks, skip, apart
        self._measured: Telemetry = {}
        self._batcher = Batcher(resblocks.count, ranks.device)
        if node_mean is not None:
            self._batcher = Batcher(resblocks.count, ranks.device, node_mean.cut, node_mean.wave)
        self._early: _Early | None = None

    @property
    def active(self) -> bool:
        """Whether there is anything to do; False for bf16 and fp32 by ZeRO over all ranks.

        Then DeepSpeed's gradients go to the optimizer as they are; what is not finite in them ends
        the run (`train/loop.py`), unless a sum given to `apply` tells of it.
        """
        return self._apart or self.scaling is not None or self.node_mean is not None

    def send(self, gradients: Sequence[Piece], wave: int) -> None:
        """Start the means between nodes up to this wave, in the backward pass; a collective call.

        `apply` does the rest, and measures nothing in such a step.

        Args:
            gradients: as they will be given to `apply`, in the same memory; those of later waves
                need not be final.
        """
        assert self.node_mean is not None
        if self._early is None:
            sending = self.node_mean.begin(self._batcher(gradients))
            self._early = _Early(sending, self._factor_K1(), _addresses(gradients))
        self._early.sending.send_up_to(wave, self._early.factor_K1)

    def apply(
        self,
        gradients: Sequence[Piece],
        copies: int,
        measure: bool,
        sums: Tensor | None = None,
    ) -> tuple[SkipDecision, list[float]]:
        """Turn the gradients into those that the optimizer gets, in place; a collective call.

        Beside means between nodes there is one all-reduce, and one copy to the host: of what is not
        finite on any rank and of `sums`. Unless the step is measured nothing else is waited for.

        Args:
            gradients: what this rank owns; left alone, and not needed, where nothing is `active`.
            copies: how many ranks own each piece.
            measure: renew what `telemetry` tells, at some cost.
            sums: numbers of the caller, fp64 on the device, to be summed over all ranks. Where a
                sum is not finite, the step is skipped.

        Returns:
            The decision, and the sums.

        Raises:
            RuntimeError: `send` was given other gradients.
        """
        batches = self._batcher(gradients) if self.active else []
        measured: Telemetry = {}
        if measure and self.scaling is not None and self._early is None:
            measured["underflow"] = self.scaling.underflow(batches)
        if self.node_mean is None:
            decision, nonfinite, summed = self._inside_node(batches, sums)
        else:
            sending = self._sent(self.node_mean, gradients, batches)
            nonfinite, summed = sending.agree(sums)
            decision = self._decide(nonfinite, summed)
            measured |= self.node_mean.finish(sending, nonfinite, decision.skip, measure)
        if self.scaling is not None:
            self.scaling.update(nonfinite)
            if measure and not decision.skip:
                measured["block_norm"] = self.scaling.norms(batches, copies)
        if measure:
            self._measured = measured
        return decision, summed

    def _inside_node(
        self, batches: Sequence[Batch], sums: Tensor | None
    ) -> tuple[SkipDecision, frozenset[Block], list[float]]:
        blocks, device = self._resblocks.count, self._ranks.device
        if self.scaling is not None:
            self.scaling.unscale(batches)
        nonfinite, summed = agree(broken_gradients(batches, blocks, device), sums)
        decision = self._decide(nonfinite, summed)
        _zero(batches, nonfinite, decision.skip)
        return decision, nonfinite, summed

    def _sent(
        self, node_mean: NodeMean, gradients: Sequence[Piece], batches: Sequence[Batch]
    ) -> Sending:
        """All means between nodes, those that `send` has begun among them."""
        early, self._early = self._early, None
        if early is None:
            sending, factor_K1 = node_mean.begin(batches), self._factor_K1()
        else:
            sending, factor_K1 = early.sending, early.factor_K1
            if early.addresses != _addresses(gradients):
                raise RuntimeError("gradients moved in memory while they were sent between nodes")
        sending.send_all(factor_K1)
        return sending

    def _factor_K1(self) -> Tensor:
        if self.scaling is not None:
            return self.scaling.factor_K1()
        return torch.ones(self._resblocks.count + 1, device=self._ranks.device)

    def _decide(self, nonfinite: frozenset[Block], sums: Sequence[float]) -> SkipDecision:
        outside, whole = None in nonfinite, self._skip == "step"
        if outside or (whole and nonfinite) or not all(map(math.isfinite, sums)):
            self.skipped += 1
            return SkipDecision(skip=True)
        blocks = self._resblocks.of.items() if nonfinite else ()
        return SkipDecision(frozen=frozenset(name for name, block in blocks if block in nonfinite))

    def telemetry(self) -> Telemetry:
        """For the log: counts up to now, and what was measured last; lists are per resblock.

        `underflow` and `block_norm` in fp16; `compression_error` and megabytes with PowerSGD. What
        a skipped step could not measure is absent.
        """
        if not self.active:
            return {}
        counts: Telemetry = {"skipped": float(self.skipped)}
        if self.scaling is not None:
            counts |= self.scaling.telemetry()
        return counts | self._measured

    def state(self) -> tuple[dict[str, Any], dict[str, list[Piece]]]:
        """(numbers, pieces of tensors by kind); a collective call when nodes average."""
        numbers: dict[str, Any] = {"skipped": self.skipped}
        tensors: dict[str, list[Piece]] = {}
        if self.scaling is not None:
            numbers["scaling"] = self.scaling.state_dict()
        if self.node_mean is not None:
            numbers["powersgd"], tensors = self.node_mean.state()
        return numbers, tensors

    def load_state(
        self, numbers: Mapping[str, Any], weights: Sequence[Piece], read: ReadPieces
    ) -> None:
        """Continue from what `state` gave, on any number of ranks and nodes.

        What the saved run did not have starts anew.

        Args:
            weights: those that this rank owns, cut as the gradients will be.
            read: as in `NodeMean.load_state`.
        """
        self.skipped = numbers["skipped"]
        if self.scaling is not None and "scaling" in numbers:
            self.scaling.load_state_dict(numbers["scaling"])
        if self.node_mean is not None and "powersgd" in numbers:
            self.node_mean.load_state(numbers["powersgd"], weights, read)


def _zero(batches: Sequence[Batch], nonfinite: frozenset[Block], skip: bool) -> None:
    if not (skip or nonfinite):
        return
    for batch in batches:
        for rows in batch.chunks if skip else batch.sound_and_other(nonfinite)[1]:
            batch.zero(rows)


def _addresses(pieces: Sequence[Piece]) -> list[int]:
    return [piece.values.data_ptr() for piece in pieces]
