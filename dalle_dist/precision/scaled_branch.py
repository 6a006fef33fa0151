"""A residual branch whose backward pass runs at the block's own scale (paper Fig. 4).

    forward    x fp32 -> layer norm -> fp16 -> f -> fp32 -> added to x
    backward   g fp32 -> filter and scale -> fp16 -> gradient of f -> fp32 -> gradient of the layer
               norm -> unscale and filter -> added to the fp32 sum

To filter is to put zero where a number is not finite: what overflows in one block must not divide
the scales of all blocks before it. The scale is read when the backward pass gets there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dalle_kernels.scaled_gradients import filter_and_scale, unscale_and_filter
from torch import Tensor
from torch.autograd.function import once_differentiable

from dalle_dist.precision.scales import BlockScale


def scaled_branch(
    x: Tensor,
    norm: Callable[[Tensor], Tensor],
    f: Callable[[Tensor], Tensor],
    scale: BlockScale,
) -> Tensor:
    """f(norm(x)) in fp32, of any shape; f computes in `scale.dtype`.

    The gradients of the parameters of f and norm come out multiplied by the scale.
    """
    x = _Unscale.apply(x, scale.scale)
    return _Scale.apply(f(norm(x).to(scale.dtype)), scale.scale)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor) -> Tensor:
        ctx.scale, ctx.dtype = scale, y.dtype
        return y.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return filter_and_scale(grad, ctx.scale, ctx.dtype), None


class _Unscale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return unscale_and_filter(grad, ctx.scale), None
