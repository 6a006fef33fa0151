"""`error_feedback` on GPUs: each pass reads and writes every value once.

A program is a block of one matrix; matrices may lie apart from one another.
"""
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels.devices import launching
from dalle_kernels.minifloat.triton_minifloat import pack, unpack

BLOCK = 1024
# Memory is the limit, so separate roundings cost nothing, and CPUs can be matched bit for bit.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def launch_add_decoded(values_BMN: Tensor, codes_BMN: Tensor, factor_B: Tensor) -> None:
    """See `add_decoded`."""
    count, numel = len(values_BMN), values_BMN.shape[1:].numel()
    with launching(values_BMN):
        add_decoded_blocks[(count * triton.cdiv(numel, BLOCK),)](
            values_BMN, codes_BMN, factor_B.contiguous(), numel, values_BMN.stride(0),
            BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip


def launch_encode_rest(values_BMN: Tensor, sent_BMN: Tensor, codes_BMN: Tensor) -> None:
    """See `encode_rest`."""
    count, numel = len(values_BMN), values_BMN.shape[1:].numel()
    with launching(values_BMN):
        encode_rest_blocks[(count * triton.cdiv(numel, BLOCK),)](
            values_BMN, sent_BMN, codes_BMN, numel, values_BMN.stride(0),
            BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip


@triton.jit
def _place(numel, BLOCK: tl.constexpr):
    """(matrix, elements in it, which of them it has) of this program.

    One axis of the grid, for it alone takes more than 65,535 matrices.
    """
    blocks = tl.cdiv(numel, BLOCK)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return matrix, at, at < numel


@triton.jit
def add_decoded_blocks(values, codes, factor, numel, stride, BLOCK: tl.constexpr):
    matrix, at, ok = _place(numel, BLOCK)
    scale = tl.load(factor + matrix)
    pointers = values + matrix * stride + at
    # What is dropped is not read.
    value = tl.load(pointers, at < tl.where(scale == 0, 0, numel), other=0)
    error = unpack(tl.load(codes + matrix * numel + at, ok, other=0), 9)
    tl.store(pointers, value * scale + error, ok)


@triton.jit
def encode_rest_blocks(values, sent, codes, numel, stride, BLOCK: tl.constexpr):
    matrix, at, ok = _place(numel, BLOCK)
    pointers, place = values + matrix * stride + at, matrix * numel + at
    taken = tl.load(sent + place, ok, other=0)
    rest = tl.load(pointers, ok, other=0) - taken
    rest = tl.where(rest == rest, rest, 0.0)
    tl.store(codes + place, pack(rest, 9), ok)
    tl.store(pointers, taken, ok)
