"""Resblocks: layer norm inside the residual branch, fp32 stream outside (paper 2.4, Fig. 4).

Shape suffixes: B batch, C captions, S states, W width, H heads, D head width, T text states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention import DecodeCache, sparse_attention
from torch import Tensor, nn

from dalle_dist.config import HEAD_DIM
from dalle_dist.transformer.embeddings import LayerNorm


class Attention(nn.Module):
    """x + out(attention(norm(x))) under one mask."""

    def __init__(self, width: int, mask: AttentionMask) -> None:
        super().__init__()
        self.mask, self.heads = mask, width // HEAD_DIM
        self.norm = LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BSW: Tensor) -> Tensor:
        attended_BSHD = sparse_attention(self._qkv(x_BSW), self.mask)
        return x_BSW + self.out(attended_BSHD.flatten(2)).float()

    def prefill(self, x_CTW: Tensor, cache: DecodeCache) -> Tensor:
        """The text states, whose keys and values go into the cache."""
        q_CHTD, k_CHTD, v_CHTD = self._qkv(x_CTW).permute(2, 0, 3, 1, 4)
        cache.put_text(k_CHTD, v_CHTD)
        out_CHTD = F.scaled_dot_product_attention(q_CHTD, k_CHTD, v_CHTD, is_causal=True)
        return x_CTW + self.out(out_CHTD.transpose(1, 2).flatten(2)).float()

    def step(self, x_B1W: Tensor, cache: DecodeCache, state: int) -> Tensor:
        """One image state, which looks at the text and at the image keys its mask allows."""
        q_BHD, k_BHD, v_BHD = self._qkv(x_B1W)[:, 0].unbind(1)
        cache.put_image(state, k_BHD, v_BHD)
        out_BHD = cache.attend(q_BHD, state)
        return x_B1W + self.out(out_BHD.flatten(1))[:, None].float()

    def _qkv(self, x_BSW: Tensor) -> Tensor:
        return self.qkv(self.norm(x_BSW)).unflatten(-1, (3, self.heads, HEAD_DIM))


class MLP(nn.Module):
    """x + down(gelu(up(norm(x)))), four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BSW: Tensor) -> Tensor:
        return x_BSW + self.down(F.gelu(self.up(self.norm(x_BSW)))).float()


class Layer(nn.Module):
    """The paper's two resblocks: attention, then MLP."""

    def __init__(self, width: int, mask: AttentionMask) -> None:
        super().__init__()
        self.attention = Attention(width, mask)
        self.mlp = MLP(width)

    def forward(self, x_BSW: Tensor) -> Tensor:
        return self.mlp(self.attention(x_BSW))

    def prefill(self, x_CTW: Tensor, cache: DecodeCache) -> Tensor:
        return self.mlp(self.attention.prefill(x_CTW, cache))

    def step(self, x_B1W: Tensor, cache: DecodeCache, state: int) -> Tensor:
        return self.mlp(self.attention.step(x_B1W, cache, state))


@torch.no_grad()
def init_layer(layer: Layer, layers: int) -> None:
    """Normal weights of deviation 0.5 / sqrt(fan-in), which is GPT-2's 0.02 at its width.

    Outputs into the stream are smaller by sqrt(2 x layers), so that depth does not add variance.
    """
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    for output in (layer.attention.out, layer.mlp.down):
        output.weight *= (2 * layers) ** -0.5
