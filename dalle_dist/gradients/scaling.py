"""fp16: unscale the gradients of each resblock, measure underflow, update the scales (paper 2.4).

Shape suffix: K resblocks; where one more is meant, K1, the last stands for all other parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_dist.distributed.process_group import Ranks
from dalle_dist.gradients.batches import Batch
from dalle_dist.gradients.piece import Block
from dalle_dist.gradients.resblocks import Resblocks
from dalle_dist.precision.scales import BlockScales

Telemetry = dict[str, float | list[float]]


class BlockScaling:
    """What the gradient scales of a model's resblocks do to its gradients.

    Args:
        scales: those that the resblocks multiply their gradients by.
    """

    def __init__(self, scales: BlockScales, resblocks: Resblocks, ranks: Ranks) -> None:
        self.scales = scales
        self._resblocks, self._ranks = resblocks, ranks
        self._other_overflows = 0  # steps in which what is in no resblock was not finite

    def factor_K1(self) -> Tensor:
        """Makes sums over ranks in true units of scaled means over ranks."""
        world = torch.full((1,), float(self._ranks.world), device=self._ranks.device)
        return torch.cat([world / self.scales.scale_K, world])

    def unscale(self, batches: Sequence[Batch]) -> None:
        """Multiply gradients by `factor_K1`, in place."""
        factor_K1 = self.factor_K1()
        for batch in batches:
            batch.scale(factor_K1)

    def update(self, nonfinite: frozenset[Block]) -> None:
        """New scales, after a step in which these resblocks were not finite on some rank."""
        self.scales.update([block in nonfinite for block in range(len(self.scales))])
        self._other_overflows += None in nonfinite

    def underflow(self, batches: Sequence[Batch]) -> list[float]:
        """Of each resblock, the share of its matrices' gradient entries that are zero.

        Asked before `unscale`; a collective call that passes over all gradients.
        """
        zeros, sizes = [0.0] * len(self.scales), [0.0] * len(self.scales)
        for batch in batches:
            kind = batch.kind
            counts = batch.zeros().tolist()
            for name, block, zero in zip(kind.names, kind.blocks, counts, strict=True):
                if block is not None and name in self._resblocks.matrices:
                    zeros[block] += zero
                    sizes[block] += kind.shape.numel()
        sums = self._ranks.sum(zeros + sizes)
        halves = zip(sums[: len(zeros)], sums[len(zeros) :], strict=True)
        return [zero / max(size, 1) for zero, size in halves]

    def norms(self, batches: Sequence[Batch], copies: int) -> list[float]:
        """Norm of each resblock's gradient; `copies` of each piece exist among the ranks."""
        squares_K1 = torch.zeros(len(self.scales) + 1, device=self._ranks.device)
        for batch in batches:
            squares_K1.index_add_(0, batch.kind.slot_B, batch.norms().float().square())
        return [(total / copies) ** 0.5 for total in self._ranks.sum(squares_K1.tolist())[:-1]]

    def telemetry(self) -> Telemetry:
        """Per resblock: scale, and overflows so far; `other_overflows` are outside of resblocks."""
        return {
            "scale": self.scales.values,
            "overflows": [float(count) for count in self.scales.overflows],
            "other_overflows": float(self._other_overflows),
        }

    def state_dict(self) -> dict[str, Any]:
        return self.scales.state_dict() | {"other_overflows": self._other_overflows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scales.load_state_dict(state)
        self._other_overflows = state["other_overflows"]
