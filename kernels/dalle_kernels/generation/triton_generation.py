"""Sum and layer norm, a program for each row; Gumbel noise, a program for some codes of a token."""
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels.devices import launching

BLOCK = 1024  # codes of a program


def launch_add_norm(
    x_W: Tensor, branch_W: Tensor | None, weight_W: Tensor, bias_W: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `api.add_norm`."""
    width = len(weight_W)
    out_W = torch.empty(x_W.shape, dtype=weight_W.dtype, device=x_W.device)
    sum_W = x_W if branch_W is None else torch.empty_like(x_W)
    rows, block = x_W.numel() // width, triton.next_power_of_2(width)
    with launching(x_W):
        add_norm_rows[(rows,)](
            x_W, x_W if branch_W is None else branch_W, sum_W, weight_W, bias_W, out_W, eps,
            ADD=branch_W is not None, WIDTH=width, BLOCK=block, num_warps=norm_warps(block),
        )  # fmt: skip
    return sum_W, out_W


def norm_warps(block: int) -> int:
    """Warps of a program: 16 numbers for each thread."""
    return min(max(block // 512, 1), 16)


def launch_gumbel(seed_M: Tensor, position_M: Tensor, codebook_size: int) -> Tensor:
    """See `api.gumbel`."""
    shape = (len(seed_M), codebook_size)
    out_MK = torch.empty(shape, dtype=torch.float32, device=seed_M.device)
    grid = (len(seed_M), triton.cdiv(codebook_size, BLOCK))
    with launching(seed_M):
        gumbel_noise[grid](
            seed_M.contiguous(), position_M.contiguous(), out_MK, codebook_size, BLOCK=BLOCK
        )
    return out_MK


@triton.jit
def add_norm_rows(
    x, branch, total, weight, bias, out, eps,
    ADD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    ok = at < WIDTH
    value = tl.load(x + row * WIDTH + at, ok, other=0)
    if ADD:
        value += tl.load(branch + row * WIDTH + at, ok, other=0).to(tl.float32)
        tl.store(total + row * WIDTH + at, value, ok)
    mean = tl.sum(value, 0) / WIDTH
    centred = tl.where(ok, value - mean, 0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    w, b = tl.load(weight + at, ok, other=0), tl.load(bias + at, ok, other=0)
    result = centred * scale * w.to(tl.float32) + b.to(tl.float32)
    tl.store(out + row * WIDTH + at, result.to(out.dtype.element_ty), ok)


@triton.jit
def mix(z):
    """SplitMix64's finisher."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def gumbel_noise(seeds, positions, out, codes, BLOCK: tl.constexpr):
    row, code = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # As wide as the codes: the interpreter computes with lone scalars in types of its own.
    seed = tl.load(seeds + row + tl.zeros_like(code)).to(tl.uint64, bitcast=True)
    position = tl.load(positions + row + tl.zeros_like(code)).to(tl.uint64, bitcast=True)
    key = mix(mix(seed * 0x9E3779B97F4A7C15) + position * 0x9E3779B97F4A7C15)
    bits = mix(key + (code + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    share = ((bits >> 11).to(tl.float32) + 0.5) * 1.1102230246251565e-16  # 2 ** -53
    share = tl.minimum(share, 0.99999994)  # 1 - 2 ** -24
    # -log1p(-share), exact to the last places also for shares that 1 swallows.
    rest = 1 - share
    lost = 1 - rest
    fall = tl.where(lost == 0, share, -tl.log(rest) * (share / tl.where(lost == 0, 1, lost)))
    at = row.to(tl.int64) * codes + code
    tl.store(out + at, -tl.log(fall), code < codes)
