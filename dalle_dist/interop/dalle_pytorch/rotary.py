"""Rotary positions of text and image (Su et al. 2021, arXiv 2104.09864), as DALLE-pytorch has them.

A third of a head's channels turns with the place in the text, a third with the row and a third with
the column in the image. All of an image stands at one place far off in the text, and all text at
one far off in the image.

Shape suffixes: S positions, N inputs, P pairs of channels, D head width, R channels that turn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FAR_IN_TEXT, FAR_IN_IMAGE = 8192.0, -10.0
BASE, FASTEST = 10_000.0, 5.0  # of the frequencies in the text, and half turns in the image


class Rotary:
    """The angles of all positions, made when first asked for, on each device."""

    def __init__(self, text: int, grid: int, head_width: int) -> None:
        self.text, self.grid, self.third = text, grid, head_width // 3
        self._of: dict[torch.device, Tensor] = {}

    def turn(self, x_N3HD: Tensor, at_N: Tensor) -> Tensor:
        """Queries, keys and values of inputs at positions `at_N`; any dimensions before N."""
        if x_N3HD.device not in self._of:
            self._of[x_N3HD.device] = self.angles().to(x_N3HD.device)
        angles_SR = self._of[x_N3HD.device]
        # Positions past the image are computed for nobody.
        angles = angles_SR[at_N.clamp(max=len(angles_SR) - 1)][..., None, None, :]
        turned, rest = x_N3HD.split([angles.shape[-1], x_N3HD.shape[-1] - angles.shape[-1]], -1)
        even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
        quarter = torch.stack([-odd, even], dim=-1).flatten(-2)
        turned = turned * angles.cos() + quarter * angles.sin()
        return torch.cat([turned.to(x_N3HD.dtype), rest], dim=-1)

    def angles(self) -> Tensor:
        """angles_SR on the CPU, those of a pair side by side; all cells of the image count."""
        pairs = self.third // 2
        slow_P = BASE ** -(torch.arange(pairs, device="cpu").float() * 2 / self.third)
        fast_P = torch.linspace(1, FASTEST, pairs, device="cpu") * math.pi
        text_S = torch.arange(self.text + self.grid**2, device="cpu").float()
        text_S[self.text :] = FAR_IN_TEXT
        line = torch.linspace(-1, 1, self.grid, device="cpu")
        away = torch.full((self.text,), FAR_IN_IMAGE, device="cpu")
        row_S = torch.cat([away, line.repeat_interleave(self.grid)])
        column_S = torch.cat([away, line.repeat(self.grid)])
        angles = [text_S[:, None] * slow_P, row_S[:, None] * fast_P, column_S[:, None] * fast_P]
        return torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
