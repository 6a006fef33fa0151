"""fp16: unscale the gradients of each resblock, measure underflow, update the scales (paper 2.4).

Shape suffix: K resblocks; where one more is meant, K1, the last stands for all other parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_dist.distributed.process_group import Ranks
from dalle_dist.gradients.piece import Block, Piece
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

    def unscale(self, gradients: Sequence[Piece], nonfinite: frozenset[Block]) -> None:
        """Sums over ranks in true units in place of scaled means over ranks; then new scales.

        Gradients of the resblocks in `nonfinite` are zero afterwards.
        """
        world = self._ranks.world
        factor_K1 = [*(world / scale for scale in self.scales.values), float(world)]
        if gradients:
            torch._foreach_mul_(
                [piece.values for piece in gradients],
                [factor_K1[k] for k in self._index(gradients)],
            )
        for piece in gradients:
            if piece.block in nonfinite:
                piece.values.zero_()
        self.scales.update([block in nonfinite for block in range(len(self.scales))])
        self._other_overflows += None in nonfinite

    def underflow(self, gradients: Sequence[Piece]) -> list[float]:
        """Of each resblock, the share of its matrices' gradient entries that are zero.

        Asked before `unscale`; a collective call that passes over all gradients.
        """
        zeros, sizes = [0.0] * len(self.scales), [0.0] * len(self.scales)
        for piece in gradients:
            if piece.block is not None and piece.name in self._resblocks.matrices:
                zeros[piece.block] += float((piece.values == 0).sum())
                sizes[piece.block] += piece.values.numel()
        sums = self._ranks.sum(zeros + sizes)
        halves = zip(sums[: len(zeros)], sums[len(zeros) :], strict=True)
        return [zero / max(size, 1) for zero, size in halves]

    def norms(self, gradients: Sequence[Piece], copies: int) -> list[float]:
        """Norm of each resblock's gradient; `copies` of each piece exist among the ranks."""
        squares_K1 = torch.zeros(len(self.scales) + 1, device=self._ranks.device)
        if gradients:
            norms = torch.stack(torch._foreach_norm([piece.values for piece in gradients]))
            squares_K1.index_add_(0, self._on_device(gradients), norms.float().square())
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

    def _index(self, gradients: Sequence[Piece]) -> list[int]:
        others = len(self.scales)
        return [others if piece.block is None else piece.block for piece in gradients]

    def _on_device(self, gradients: Sequence[Piece]) -> Tensor:
        return torch.tensor(self._index(gradients), device=self._ranks.device)
