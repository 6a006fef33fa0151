"""The same on GPUs: each pass reads and writes every value once."""
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels.devices import launching

BLOCK = 1024
# Memory is the limit, so separate roundings cost nothing, and CPUs can be matched bit for bit.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def launch_filter_and_scale(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See `api.filter_and_scale`."""
    return _launch(filter_and_scale_all, grad, scale, dtype)


def launch_unscale_and_filter(grad: Tensor, scale: Tensor) -> Tensor:
    """See `api.unscale_and_filter`."""
    return _launch(unscale_and_filter_all, grad, scale, torch.float32)


def _launch(kernel: triton.JITFunction, grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    numel = out.numel()
    with launching(grad):
        kernel[(triton.cdiv(numel, BLOCK),)](
            grad.contiguous(), scale, out, numel, BLOCK=BLOCK, **OPTIONS
        )
    return out


@triton.jit
def _finite_or_zero(value):
    """No comparison holds for NaN."""
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit
def filter_and_scale_all(grad, scale, out, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = _finite_or_zero(tl.load(grad + at, at < numel, other=0))
    tl.store(out + at, (value * tl.load(scale)).to(out.dtype.element_ty), at < numel)


@triton.jit
def unscale_and_filter_all(grad, scale, out, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(grad + at, at < numel, other=0)
    # Rounded as IEEE 754 says, as on CPUs: `/` is an approximation here.
    quotient = tl.div_rn(value, tl.zeros_like(value) + tl.load(scale))
    tl.store(out + at, _finite_or_zero(quotient), at < numel)
