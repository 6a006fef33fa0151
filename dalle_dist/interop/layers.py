"""The layer that ruDALL-E and minDALL-E have in common: attention, then MLP, each after its norm.

Shape suffixes: B batch, N positions of the input, W width, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_dist.interop.base import Branch, attend
from dalle_dist.interop.place import Place
from dalle_dist.precision.linear import ResblockLinear
from dalle_dist.transformer.embeddings import LayerNorm


@dataclass(frozen=True)
class LayerShape:
    """What tells one program's layer from another's.

    width, heads  of the attention
    gelu          exact ("none"), or by a hyperbolic tangent
    sandwich      whether what a branch gives is normed once more before it is added (Ding et al.
                  2021, arXiv 2105.13290, 2.4)
    """

    width: int
    heads: int
    gelu: Literal["none", "tanh"]
    sandwich: bool


class Attention(Branch):
    """Under the mask that `place` gives."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape.width)
        self.heads = shape.heads
        self.qkv = ResblockLinear(shape.width, 3 * shape.width)
        self.out = ResblockLinear(shape.width, shape.width)
        self.norm_out = LayerNorm(shape.width) if shape.sandwich else nn.Identity()

    def inside(self, h_BNW: Tensor, place: Place) -> Tensor:  # type: ignore[override]
        q_BNHD, k_BNHD, v_BNHD = self.qkv(h_BNW).unflatten(-1, (3, self.heads, -1)).unbind(2)
        k_BSHD, v_BSHD = place.everywhere("k", k_BNHD), place.everywhere("v", v_BNHD)
        out_BNW = attend(q_BNHD, k_BSHD, v_BSHD, place.seen(h_BNW.shape[1]))
        added_BNW: Tensor = self.norm_out(self.out(out_BNW))
        return added_BNW


class MLP(Branch):
    """Four times as wide inside."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape.width)
        self.gelu = shape.gelu
        self.up = ResblockLinear(shape.width, 4 * shape.width)
        self.down = ResblockLinear(4 * shape.width, shape.width)
        self.norm_out = LayerNorm(shape.width) if shape.sandwich else nn.Identity()

    def inside(self, h_BNW: Tensor, place: Place) -> Tensor:  # type: ignore[override]
        inner = F.gelu(self.up(h_BNW), approximate=self.gelu)
        added_BNW: Tensor = self.norm_out(self.down(inner))
        return added_BNW


class Layer(nn.Module):
    """Both branches."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(shape), MLP(shape)

    def forward(self, x_BNW: Tensor, place: Place) -> Tensor:
        x_BNW = self.mlp(self.attention(x_BNW, place), place)
        return x_BNW


@torch.no_grad()
def init_weights(model: nn.Module) -> None:
    """Matrices normal with deviation 0.02, as in both programs."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
