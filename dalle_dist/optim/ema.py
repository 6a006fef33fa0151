"""Exponential moving average of the fp32 weights, kept by the ranks that own them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dalle_dist.gradients.piece import Piece


class EMA:
    """Average of the pieces that one rank owns; `update` folds in the present weights.

    The n-th fold (from 0) uses min(decay, n / (n + 9)): the first copies, and while n is small the
    average spans the last tenth of the run instead of the random start. With the paper's 0.99 every
    25 steps the bound is reached after 22,000 steps (paper B.2 has 430,000).

    Args:
        device: where the average is kept; None: where the weights are.
    """

    def __init__(self, decay: float, device: str | None = "cpu") -> None:
        self.decay = decay
        self.folds = 0
        self._device = device
        self._values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, weights: Sequence[Piece]) -> None:
        decay = min(self.decay, self.folds / (self.folds + 9))
        present = {piece.key: self._fp32(piece) for piece in weights}
        if self.folds == 0:
            self._values = {key: values.clone() for key, values in present.items()}
        elif present:
            averages = [self._values[key].to(values.device) for key, values in present.items()]
            torch._foreach_lerp_(averages, list(present.values()), 1 - decay)
            self._values = dict(zip(present, averages, strict=True))
        self.folds += 1

    def state(self, weights: Sequence[Piece]) -> dict[str, Tensor]:
        """Averages by piece key; before the first fold, the present values."""
        if self.folds:
            return dict(self._values)
        return {piece.key: self._fp32(piece).clone() for piece in weights}

    def load(self, state: Mapping[str, Tensor], folds: int) -> None:
        self._values = {key: tensor.clone() for key, tensor in state.items()}
        self.folds = folds

    def _fp32(self, piece: Piece) -> Tensor:
        return piece.values.detach().to(self._device or piece.values.device, torch.float32)
