"""Exponential moving average of the fp32 weights, kept by the ranks that own them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dalle_dist.gradients.piece import Piece


class EMA:
    """Average of the pieces that one rank owns; `update` takes in the present weights.

    The n-th update (from 0) uses min(decay, n / (n + 9)): the first copies, and while n is small
    the average spans the last tenth of the run instead of the random start. With the paper's 0.99
    every 25 steps the bound is reached after 22,000 steps (paper B.2 has 430,000).

    Args:
        device: where the average is kept; None: where the weights are. Each rank keeps its share
            alone, so that all of a run's ranks together hold one average.
    """

    def __init__(self, decay: float, device: str | None = None) -> None:
        self.decay = decay
        self.updates = 0
        self._device = device
        self._values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, weights: Sequence[Piece]) -> None:
        decay = min(self.decay, self.updates / (self.updates + 9))
        if self.updates == 0:
            self._values = {piece.key: self._copy(piece) for piece in weights}
        elif self._device is None and weights:
            present = [piece.values.detach().float() for piece in weights]
            averages = [self._values[piece.key].to(piece.values.device) for piece in weights]
            torch._foreach_lerp_(averages, present, 1 - decay)
            self._values = {p.key: a for p, a in zip(weights, averages, strict=True)}
        else:
            # One by one: all at once, the weights would be on the host twice.
            for piece in weights:
                present_piece = piece.values.detach().to(self._device, torch.float32)
                self._values[piece.key].lerp_(present_piece, 1 - decay)
        self.updates += 1

    def state(self, weights: Sequence[Piece]) -> dict[str, Tensor]:
        """Averages by piece key; before the first update, the present values."""
        if self.updates:
            return dict(self._values)
        return {piece.key: self._copy(piece) for piece in weights}

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        self._values = {key: tensor.clone() for key, tensor in state.items()}
        self.updates = updates

    def _copy(self, piece: Piece) -> Tensor:
        device = self._device or piece.values.device
        return piece.values.detach().to(device, torch.float32, copy=True)
