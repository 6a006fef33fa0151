"""DALLE-pytorch's layers: attention with rotary positions, gated MLP, shifted channels.

Shape suffixes: B batch, N inputs, S positions, W width, H heads, D head width, X any of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_dist.interop.base import Branch, attend
from dalle_dist.interop.dalle_pytorch.rotary import Rotary
from dalle_dist.interop.place import Place
from dalle_dist.transformer.embeddings import LayerNorm


class Attention(nn.Module):
    """Softmax attention without a bias before it, rotary positions on queries, keys and values."""

    def __init__(
        self, width: int, heads: int, head_width: int, rotary: Rotary | None, dropout: float
    ) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h_BNW: Tensor, place: Place) -> Tensor:
        qkv_BN3HD = self.qkv(h_BNW).unflatten(-1, (3, self.heads, -1))
        if self.rotary is not None:
            at = place.indices(h_BNW.shape[1], h_BNW.device)
            qkv_BN3HD = self.rotary.turn(qkv_BN3HD, at)
        q_BNHD, k_BNHD, v_BNHD = qkv_BN3HD.unbind(2)
        k_BSHD, v_BSHD = place.everywhere("key", k_BNHD), place.everywhere("value", v_BNHD)
        out_BND = attend(q_BNHD, k_BSHD, v_BSHD, place.seen(h_BNW.shape[1]))
        found: Tensor = self.dropout(self.out(out_BND))
        return found


class GatedMLP(nn.Module):
    """down(value * gelu(gate)), four times as wide inside."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, 8 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h_BNW: Tensor, place: Place) -> Tensor:
        value, gate = self.up(h_BNW).chunk(2, dim=-1)
        found: Tensor = self.down(self.dropout(value * F.gelu(gate)))
        return found


class Shift:
    """Channels from the position before in the text, from above and from the left in the image."""

    def __init__(self, text: int, grid: int) -> None:
        self.text, self.grid = text, grid

    def __call__(self, h_BNW: Tensor, place: Place) -> Tensor:
        all_BSW, width = place.everywhere("shifted", h_BNW), h_BNW.shape[-1]
        at_BN = place.indices(h_BNW.shape[1], h_BNW.device).expand(h_BNW.shape[:2])
        cell_BN = at_BN - self.text
        above = _from(all_BSW, at_BN - self.grid, cell_BN >= self.grid)
        left = _from(all_BSW, at_BN - 1, cell_BN % self.grid != 0)
        before = _from(all_BSW, at_BN - 1, at_BN > 0)
        quarter, half = math.ceil(width / 4), math.ceil(width / 2)
        image = [above[..., :quarter], left[..., quarter : 2 * quarter], h_BNW[..., 2 * quarter :]]
        text = [before[..., :half], h_BNW[..., half:]]
        is_text = (cell_BN < 0)[..., None]
        return torch.where(is_text, torch.cat(text, dim=-1), torch.cat(image, dim=-1))


class ScaledBranch(Branch):
    """norm, shift, what is inside, a second norm and a gain of each channel.

    inner  the layer's own attention or MLP, where no earlier layer owns it
    """

    def __init__(
        self,
        width: int,
        inner: Attention | GatedMLP,
        *,
        owned: bool = True,
        shift: Shift | None = None,
        sandwich: bool = False,
    ) -> None:
        super().__init__(width)
        self.norm_out = LayerNorm(width) if sandwich else nn.Identity()
        self.gain, self.shift = nn.Parameter(torch.ones(width)), shift
        # In a tuple, which torch does not look into: what layers share has the name of its owner.
        self.shared = (inner,)
        if owned:
            self.inner = inner

    def inside(self, h_BNW: Tensor, place: Place) -> Tensor:  # type: ignore[override]
        if self.shift is not None:
            h_BNW = self.shift(h_BNW, place)
        found: Tensor = self.norm_out(self.shared[0](h_BNW, place)) * self.gain
        return found


class Layer(nn.Module):
    """Attention and MLP, one after the other, or each on one half of a doubled stream."""

    def __init__(self, attention: ScaledBranch, mlp: ScaledBranch, reversible: bool) -> None:
        super().__init__()
        self.attention, self.mlp, self.reversible = attention, mlp, reversible

    def forward(self, x_BNW: Tensor, place: Place) -> Tensor:
        attention, mlp = place.of("attention "), place.of("mlp ")
        if not self.reversible:
            found: Tensor = self.mlp(self.attention(x_BNW, attention), mlp)
            return found
        one, other = x_BNW.chunk(2, dim=-1)
        one = one + self.attention.branch(other, attention)
        return torch.cat([one, other + self.mlp.branch(one, mlp)], dim=-1)


def _from(all_BSW: Tensor, source_BN: Tensor, real_BN: Tensor) -> Tensor:
    """Channels of other positions; zeros where there is none."""
    rows_B1 = torch.arange(len(all_BSW), device=all_BSW.device)[:, None]
    return all_BSW[rows_B1, source_BN.clamp(min=0)] * real_BN[..., None]
