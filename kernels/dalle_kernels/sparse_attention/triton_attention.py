"""The Triton backend: both kernels as one differentiable function, fp32, fp16 and bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention.triton_backward import backward
from dalle_kernels.sparse_attention.triton_config import backward_tiles, forward_tiles
from dalle_kernels.sparse_attention.triton_forward import forward


def attention(qkv_BN3HD: Tensor, mask: AttentionMask) -> Tensor:
    """out_BNHD; see `sparse_attention`."""
    return _Attention.apply(qkv_BN3HD, mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_BN3HD: Tensor, mask: AttentionMask) -> Tensor:
        if qkv_BN3HD.stride(-1) != 1:
            qkv_BN3HD = qkv_BN3HD.contiguous()
        tiles = forward_tiles(qkv_BN3HD.shape[-1], qkv_BN3HD.dtype)
        out_BNHD, lse_BHN = forward(qkv_BN3HD, mask, tiles)
        ctx.save_for_backward(qkv_BN3HD, out_BNHD, lse_BHN)
        ctx.mask = mask
        return out_BNHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNHD: Tensor) -> tuple[Tensor, None]:
        qkv_BN3HD, out_BNHD, lse_BHN = ctx.saved_tensors
        capability, width = _capability(qkv_BN3HD), qkv_BN3HD.shape[-1]
        tiles = backward_tiles(capability, width, qkv_BN3HD.dtype, ctx.mask)
        grad_BNHD = grad_BNHD.contiguous()
        return backward(grad_BNHD, qkv_BN3HD, out_BNHD, lse_BHN, ctx.mask, tiles), None


def _capability(tensor: Tensor) -> tuple[int, int]:
    """Of the tensor's GPU; Hopper's where the interpreter stands in for one."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)
