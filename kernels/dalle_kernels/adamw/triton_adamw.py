"""The update as one pass over parameter, gradient and moments.

Bytes moved per element with an fp32 gradient: 28 with fp32 moments, 20 with 16-bit ones.
"""
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels.adamw.hyperparameters import Hyperparameters
from dalle_kernels.devices import launching
from dalle_kernels.minifloat.triton_minifloat import pack, unpack

BLOCK = 1024
# Memory is the limit, so separate roundings cost nothing, and CPUs can be matched bit for bit.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

SCALARS = ("keep", "size", "root", "beta1", "rest1", "beta2", "rest2", "eps", "clip")


def update(
    param: Tensor, grad: Tensor, mean: Tensor, variance: Tensor, by: Hyperparameters
) -> None:
    """See `adamw_`."""
    numel = param.numel()
    with launching(param):
        adamw_update[(triton.cdiv(numel, BLOCK),)](
            param, grad, mean, variance, numel,
            by.keep, by.size, by.root, by.beta1, 1 - by.beta1, by.beta2, 1 - by.beta2, by.eps,
            by.variance_clip, CLIP=by.variance_clip > 0, PACKED=mean.dtype == torch.uint16,
            BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip


@triton.jit
def adamw_update(
    param, grad, mean, variance, numel,
    keep, size, root, beta1, rest1, beta2, rest2, eps, clip,
    CLIP: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < numel
    p = tl.load(param + at, ok, other=0)
    g = tl.load(grad + at, ok, other=0).to(tl.float32)
    m, v = tl.load(mean + at, ok, other=0), tl.load(variance + at, ok, other=0)
    if PACKED:
        m, v = unpack(m, 9), unpack(v, 10)
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    if CLIP:
        v = tl.where(v > clip, clip, v)  # a NaN stays one, as in torch's clamp
    step = tl.div_rn(m, tl.sqrt_rn(v) * root + eps) * size
    tl.store(param + at, p * keep - step, ok)
    if PACKED:
        m, v = pack(m, 9), pack(v, 10)
    tl.store(mean + at, m, ok)
    tl.store(variance + at, v, ok)
