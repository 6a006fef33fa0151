"""The same on GPUs: `pack` and `unpack` for use inside other kernels, and a launch of each alone.

Inside kernels a format is named by its mantissa bits: 9 for 1-6-9, 10 for 0-6-10.
"""
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels.devices import launching
from dalle_kernels.minifloat.formats import Format

BLOCK = 1024


@triton.jit
def pack(x, MANTISSA: tl.constexpr):
    """uint16 words of an fp32 block."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    LARGEST: tl.constexpr = (131 << 23) - (1 << DROPPED)
    LEAST: tl.constexpr = (67 << 23) + (1 << DROPPED)
    # NaN becomes the largest value: of a number and a NaN this minimum is the number.
    word = tl.minimum(x, 16.0).to(tl.int32, bitcast=True)
    magnitude = word
    if MANTISSA == 9:
        magnitude = word & 0x7FFFFFFF
    code = tl.minimum(magnitude, LARGEST) + (1 << (DROPPED - 1))
    code = (code >> DROPPED) - (67 << MANTISSA)
    if MANTISSA == 9:
        sign = (word >> 16) & 0x8000
        code = tl.where(magnitude < LEAST, tl.where(magnitude == 0, sign, 0), code | sign)
    else:
        code = tl.where(magnitude < LEAST, 0, code)
    return code.to(tl.uint16)


@triton.jit
def unpack(bits, MANTISSA: tl.constexpr):
    """fp32 values of a block of uint16 words."""
    code = bits.to(tl.int32)
    magnitude = code
    if MANTISSA == 9:
        magnitude = code & 0x7FFF
    word = (magnitude << (23 - MANTISSA)) + (67 << 23)
    word = tl.where(magnitude == 0, 0, word)
    if MANTISSA == 9:
        word = word | ((code & 0x8000) << 16)
    return word.to(tl.float32, bitcast=True)


@triton.jit
def pack_all(x, out, numel, MANTISSA: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < numel, other=0).to(tl.float32)
    tl.store(out + at, pack(value, MANTISSA), at < numel)


@triton.jit
def unpack_all(bits, out, numel, MANTISSA: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, unpack(tl.load(bits + at, at < numel, other=0), MANTISSA), at < numel)


def launch_pack(x: Tensor, fmt: Format) -> Tensor:
    """uint16 words of a float tensor of any shape."""
    return _launch(pack_all, x, torch.uint16, fmt)


def launch_unpack(bits: Tensor, fmt: Format) -> Tensor:
    """fp32 values of a uint16 tensor of any shape."""
    return _launch(unpack_all, bits, torch.float32, fmt)


def _launch(kernel: triton.JITFunction, given: Tensor, dtype: torch.dtype, fmt: Format) -> Tensor:
    out = torch.empty(given.shape, dtype=dtype, device=given.device)
    grid = (triton.cdiv(out.numel(), BLOCK),)
    with launching(given):
        kernel[grid](given.contiguous(), out, out.numel(), MANTISSA=fmt.mantissa, BLOCK=BLOCK)
    return out
