"""One pair of entry points, two backends."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_kernels.devices import use_triton
from dalle_kernels.minifloat import torch_minifloat
from dalle_kernels.minifloat.formats import FORMATS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pack(x: Tensor, fmt: str, backend: str = "auto") -> Tensor:
    """Round x to 16 bits: uint16 words of x's shape, contiguous.

    To the nearest value, halves away from zero; beyond the largest value (infinities too), to it.
    Below the least one, to the all-zero word; so are all negatives in "0-6-10". Only -0.0 packs to
    the sign bit alone in "1-6-9". NaN becomes the largest value (as in the original's kernel): the
    words cannot say that something was not finite, so whoever needs to know asks before packing.

    Args:
        x: fp32, fp16 or bf16, any shape.
        fmt: "1-6-9" or "0-6-10" (paper 2.4; see `formats`).
        backend: "torch" (any device), "triton", or "auto": Triton on GPUs where it runs.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"x: {type(x).__name__} is not a tensor")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: dtype {x.dtype} is not one of fp32, fp16, bf16")
    _check_format(fmt)
    if use_triton(x, backend):
        from dalle_kernels.minifloat import triton_minifloat

        return triton_minifloat.launch_pack(x, FORMATS[fmt])
    return torch_minifloat.pack(x.float().contiguous(), FORMATS[fmt])


def unpack(bits: Tensor, fmt: str, backend: str = "auto") -> Tensor:
    """The fp32 values of uint16 words, exactly; arguments and errors as for `pack`."""
    if not isinstance(bits, Tensor):
        raise ValueError(f"bits: {type(bits).__name__} is not a tensor")
    if bits.dtype != torch.uint16:
        raise ValueError(f"bits: dtype {bits.dtype} is not uint16")
    _check_format(fmt)
    if use_triton(bits, backend):
        from dalle_kernels.minifloat import triton_minifloat

        return triton_minifloat.launch_unpack(bits, FORMATS[fmt])
    return torch_minifloat.unpack(bits.contiguous(), FORMATS[fmt])


def _check_format(fmt: str) -> None:
    if fmt not in FORMATS:
        raise ValueError(f"fmt: {fmt!r} is not one of {', '.join(FORMATS)}")
