"""The gradient transforms between reduce-scatter and optimizer step, in their order.

Unscale each resblock (fp16), average between nodes (dense or PowerSGD), and decide what becomes of
the optimizer step when something is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dalle_dist.choices import Skip
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.gradients.finite import nonfinite_blocks
from dalle_dist.gradients.node_mean import NodeMean
from dalle_dist.gradients.piece import Block, Piece, ReadPieces
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


class GradientTransform:
    """Unscaling and the mean between nodes, where a config asks for them.

    Args:
        skip: "step": a resblock whose gradient is not finite costs the whole optimizer step
            (paper 2.4); "block": it costs that resblock's part of it.
    """

    def __init__(
        self,
        resblocks: Resblocks,
        ranks: Ranks,
        skip: Skip = "step",
        scaling: BlockScaling | None = None,
        node_mean: NodeMean | None = None,
    ) -> None:
        self.scaling, self.node_mean = scaling, node_mean
        self.skipped = 0  # steps so far
        self._resblocks, self._ranks, self._skip = resblocks, ranks, skip
        self._measured: Telemetry = {}

    @property
    def active(self) -> bool:
        """Whether there is anything to do; False for bf16 and fp32 without means between nodes.

        Then `skip` has no effect: DeepSpeed's gradients go to the optimizer as they are, and a
        loss or norm that is not finite ends the run (`train/loop.py`).
        """
        return self.scaling is not None or self.node_mean is not None

    def apply(self, gradients: Sequence[Piece], copies: int, measure: bool) -> SkipDecision:
        """Turn the gradients into those that the optimizer gets, in place; a collective call.

        Args:
            copies: how many ranks own each piece.
            measure: renew what `telemetry` tells, at some cost.
        """
        measured: Telemetry = {}
        nonfinite = nonfinite_blocks(gradients, self._resblocks.count, self._ranks.device)
        if self.scaling is not None:
            if measure:
                measured["underflow"] = self.scaling.underflow(gradients)
            self.scaling.unscale(gradients, nonfinite)
        # A step that will be skipped is not sent, and no error buffer changes.
        if not self._skips(nonfinite):
            nonfinite |= self._average(gradients, nonfinite, measure, measured)
            if self.scaling is not None and measure:
                measured["block_norm"] = self.scaling.norms(gradients, copies)
        if measure:
            self._measured = measured
        return self._decide(gradients, nonfinite)

    def _average(
        self,
        gradients: Sequence[Piece],
        nonfinite: frozenset[Block],
        measure: bool,
        measured: Telemetry,
    ) -> frozenset[Block]:
        """Means between nodes; the resblocks for which that failed."""
        if self.node_mean is None:
            return frozenset()
        averaged = self.node_mean.average(gradients, nonfinite, measure)
        measured |= averaged.telemetry
        if self._skips(averaged.nonfinite):
            self.node_mean.undo(averaged)
        return averaged.nonfinite

    def _decide(self, gradients: Sequence[Piece], nonfinite: frozenset[Block]) -> SkipDecision:
        if self._skips(nonfinite):
            self.skipped += 1
            for piece in gradients:
                piece.values.zero_()
            return SkipDecision(skip=True)
        blocks = self._resblocks.of.items()
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

    def _skips(self, nonfinite: frozenset[Block]) -> bool:
        return None in nonfinite or (self._skip == "step" and bool(nonfinite))
