"""Resblocks: layer norm inside the residual branch, fp32 stream outside (paper 2.4, Fig. 4).

In fp16 every resblock has a gradient scale of its own (`dalle_dist.precision`).

Shape suffixes: B batch, C captions, S positions, N image positions, W width, H heads, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention import BlockCache, DecodeCache, sparse_attention
from torch import Tensor, nn

from dalle_dist.config import HEAD_DIM
from dalle_dist.gradients.resblocks import Resblocks
from dalle_dist.precision.linear import ResblockLinear
from dalle_dist.precision.scaled_branch import scaled_branch
from dalle_dist.precision.scales import BlockScale, BlockScales
from dalle_dist.transformer.embeddings import LayerNorm
from dalle_dist.transformer.initial import Initial

Cache = DecodeCache | BlockCache


class Resblock(nn.Module, ABC):
    """x + inside(norm(x)); `scale` is set by `attach_scales` where gradients are scaled."""

    scale: BlockScale | None = None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)

    def forward(self, x_BSW: Tensor) -> Tensor:
        if self.scale is None:
            return x_BSW + self.inside(self.norm(x_BSW))
        return x_BSW + scaled_branch(x_BSW, self.norm, self.inside, self.scale)

    @abstractmethod
    def inside(self, h_BSW: Tensor) -> Tensor:
        """What the block computes, in 16 bits where the precision says so."""


class Attention(Resblock):
    """x + out(attention(norm(x))) under one mask."""

    def __init__(self, width: int, mask: AttentionMask) -> None:
        super().__init__(width)
        self.mask, self.heads = mask, width // HEAD_DIM
        self.qkv = ResblockLinear(width, 3 * width)
        self.out = ResblockLinear(width, width)

    def inside(self, h_BSW: Tensor) -> Tensor:
        return self.out(sparse_attention(self._qkv(h_BSW), self.mask).flatten(2))

    def prefill(self, x_CSW: Tensor, cache: Cache) -> Tensor:
        """The text and the first image tokens, whose keys and values go into the cache."""
        q_CHSD, k_CHSD, v_CHSD = self._qkv(self.norm(x_CSW)).permute(2, 0, 3, 1, 4)
        text, length = self.mask.text, x_CSW.shape[1]
        cache.put_text(k_CHSD[:, :, :text], v_CHSD[:, :, :text])
        if length == text:
            out_CHSD = F.scaled_dot_product_attention(q_CHSD, k_CHSD, v_CHSD, is_causal=True)
        else:
            cache.put_prefix(k_CHSD[:, :, text:], v_CHSD[:, :, text:])
            seen = self.mask.dense()[:length, :length].to(x_CSW.device)
            out_CHSD = F.scaled_dot_product_attention(q_CHSD, k_CHSD, v_CHSD, attn_mask=seen)
        return x_CSW + self.out(out_CHSD.transpose(1, 2).flatten(2))

    def step(self, h_BNW: Tensor, cache: Cache, at: int | Tensor) -> Tensor:
        """Of the next image tokens, which look at the text and what their mask allows of the image.

        `at` is what the cache's `extend` takes.
        """
        q_BNHD, k_BNHD, v_BNHD = self._qkv(h_BNW).unbind(2)
        out_BNHD = cache.extend(at, q_BNHD, k_BNHD, v_BNHD)  # type: ignore[arg-type]
        return self.out(out_BNHD.flatten(2))

    def _qkv(self, h_BSW: Tensor) -> Tensor:
        return self.qkv(h_BSW).unflatten(-1, (3, self.heads, HEAD_DIM))


class MLP(Resblock):
    """x + down(gelu(up(norm(x)))), four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.up = ResblockLinear(width, 4 * width)
        self.down = ResblockLinear(4 * width, width, inputs_first=True)

    def inside(self, h_BSW: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(h_BSW)))


class Layer(nn.Module):
    """The paper's two resblocks: attention, then MLP."""

    def __init__(self, width: int, mask: AttentionMask) -> None:
        super().__init__()
        self.attention = Attention(width, mask)
        self.mlp = MLP(width)

    def forward(self, x_BSW: Tensor) -> Tensor:
        return self.mlp(self.attention(x_BSW))

    def prefill(self, x_CSW: Tensor, cache: Cache) -> Tensor:
        return self.mlp(self.attention.prefill(x_CSW, cache))

    def step(
        self, x_BNW: Tensor, branch_BNW: Tensor | None, cache: Cache, at: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """(stream, what is to be added to it): the next layer's norm adds it, in one kernel."""
        x_BNW, h_BNW = self.attention.norm.after(x_BNW, branch_BNW)
        branch_BNW = self.attention.step(h_BNW, cache, at)
        x_BNW, h_BNW = self.mlp.norm.after(x_BNW, branch_BNW)
        return x_BNW, self.mlp.inside(h_BNW)


def layer_initials(layer: Layer, layers: int) -> dict[str, Initial]:
    """Normal weights of deviation 0.5 / sqrt(fan-in), which is GPT-2's 0.02 at its width.

    Outputs into the stream are smaller by sqrt(2 x layers), so that depth does not add variance.
    """
    found = {}
    outputs = (layer.attention.out, layer.mlp.down)
    for name, module in layer.named_modules():
        if isinstance(module, ResblockLinear):
            shrunk = (2 * layers) ** -0.5 if module in outputs else 1.0
            found[f"{name}.weight"] = Initial(std=0.5 * module.in_features**-0.5 * shrunk)
            found[f"{name}.bias"] = Initial()
        elif isinstance(module, LayerNorm):
            found[f"{name}.weight"], found[f"{name}.bias"] = Initial(mean=1.0), Initial()
    return found


def resblocks(model: nn.Module) -> list[tuple[str, Resblock]]:
    """Names and resblocks in the order of the forward pass: attention, MLP, attention, ..."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, Resblock)]


def resblock_map(model: nn.Module) -> Resblocks:
    """Which resblock each parameter belongs to; asked before ZeRO-3 takes the parameters apart."""
    blocks = resblocks(model)
    named = [
        (number, f"{name}.{own}", parameter)
        for number, (name, block) in enumerate(blocks)
        for own, parameter in block.named_parameters()
    ]
    return Resblocks(
        count=len(blocks),
        of={name: number for number, name, _ in named},
        matrices={name: (p.shape[0], p.shape[1]) for _, name, p in named if p.ndim == 2},
        stacked={f"{name}.qkv.weight": 3 for name, b in blocks if isinstance(b, Attention)},
    )


def decayed(model: nn.Module) -> list[str]:
    """Names of the parameters with weight decay: the matrices of resblocks.

    The paper gives the decay and not its targets (B.2); gains, biases and embeddings are left
    alone, as is the custom.
    """
    return list(resblock_map(model).matrices)


def attach_scales(model: nn.Module, scales: BlockScales, dtype: torch.dtype) -> None:
    """Let every resblock compute in `dtype` and scale its gradients; one scale for each."""
    for index, (_, block) in enumerate(resblocks(model)):
        block.scale = BlockScale(scales, index, dtype)


def compile_blocks(model: nn.Module) -> None:
    """Have torch.compile fuse what each resblock computes; the gradient flow around it is ours."""
    for _, block in resblocks(model):
        block.inside = torch.compile(block.inside)  # type: ignore[method-assign]
