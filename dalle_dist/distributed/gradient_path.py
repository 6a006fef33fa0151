"""From the reduced gradient of a machine to what the optimizer may apply; nothing of DeepSpeed.

Unscale each resblock (fp16), average between machines (dense or PowerSGD), and decide what becomes
of the update when something is not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dalle_dist.distributed.block_scaling import BlockScaling
from dalle_dist.distributed.replicas import Block, Replicas
from dalle_dist.optim.ema import Fragment
from dalle_dist.transformer.blocks import block_of

Skip = Literal["update", "block"]


@dataclass(frozen=True)
class Verdict:
    """What is to be done with an update; the same on every rank.

    skip    nothing may change
    frozen  names of parameters that may not change
    """

    skip: bool = False
    frozen: frozenset[str] = frozenset()


class GradientPath:
    """The stations between backward pass and optimizer, those that a config asks for.

    Args:
        skip: "update": a resblock whose gradient is not finite costs the whole update (paper 2.4);
            "block": it costs the update of that block.
    """

    def __init__(
        self, model: nn.Module, skip: Skip, scaling: BlockScaling | None, replicas: Replicas | None
    ) -> None:
        self.scaling, self.replicas = scaling, replicas
        self.skipped = 0  # updates so far
        self._skip, self._block = skip, block_of(model)

    def prepare(
        self, gradients: Callable[[], list[Fragment]], copies: int, measure: bool
    ) -> Verdict:
        """Turn the gradients into those to be applied, in place.

        Args:
            copies: how many ranks own each piece.
            measure: renew what `numbers` tells, at some cost.
        """
        if self.scaling is None and self.replicas is None:
            return Verdict()
        pieces, bad = gradients(), frozenset[Block]()
        if self.scaling is not None:
            bad = self.scaling.unscale(pieces, measure)
        if self.replicas is not None:
            self.replicas.telemetry = {}  # the last update's, which this one may not renew
        # An update that will be skipped is not sent, and no error buffer changes.
        unsent = self.replicas is not None and self._skips(bad)
        if self.replicas is not None and not unsent:
            bad = self.replicas.reduce(pieces, bad, measure)
            if self._skips(bad):
                self.replicas.undo()
        # Of gradients that were not sent there is no mean over the machines to be measured.
        if self.scaling is not None and measure and not unsent:
            self.scaling.measure_norms(pieces, copies)
        skip = self._skips(bad)
        self.skipped += skip
        if skip:
            for piece in pieces:
                piece.values.zero_()
        frozen = frozenset(name for name, block in self._block.items() if block in bad)
        return Verdict(skip, frozenset() if skip else frozen)

    def numbers(self) -> dict[str, float | list[float]]:
        """For the log; lists have one number per resblock or per matrix."""
        if self.scaling is None and self.replicas is None:
            return {}
        numbers: dict[str, float | list[float]] = {"skipped": float(self.skipped)}
        if self.scaling is not None:
            numbers |= self.scaling.numbers()
        return numbers | ({} if self.replicas is None else self.replicas.telemetry)

    def _skips(self, bad: frozenset[Block]) -> bool:
        return None in bad or (self._skip == "update" and bool(bad))
