"""One entry point, several backends.

Shape suffixes: B batch, N tokens, H heads, D head width; 3 is query, key, value.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from dalle_kernels.devices import triton_missing
from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention import cpu, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (32, 64, 128)


def _triton(qkv_BN3HD: Tensor, mask: AttentionMask) -> Tensor:
    missing = unfit(qkv_BN3HD)
    if missing:
        raise ValueError(f"backend: 'triton' cannot run here: {missing}")
    from dalle_kernels.sparse_attention import triton_attention

    return triton_attention.attention(qkv_BN3HD, mask)


BACKENDS: dict[str, Callable[[Tensor, AttentionMask], Tensor]] = {
    "reference": reference.attention,
    "cpu": cpu.attention,
    "triton": _triton,
}


def sparse_attention(qkv_BN3HD: Tensor, mask: AttentionMask, backend: str = "auto") -> Tensor:
    """Scaled dot-product attention where `mask` allows it: out_BNHD, differentiable once.

    Args:
        qkv_BN3HD: queries, keys and values, token-major; read where they lie. Triton takes fp32,
            fp16 and bf16, and a width D of 32, 64 or 128.
        mask: over exactly N tokens.
        backend: "reference" (dense boolean mask), "cpu" or "triton" (both skip what the mask
            hides), or "auto": the quickest that runs here. On a GPU without Triton that is the
            reference, after one warning.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(qkv_BN3HD, mask, backend)
    if backend == "auto":
        backend = quickest(qkv_BN3HD, mask)
    return BACKENDS[backend](qkv_BN3HD, mask)


def _check(qkv_BN3HD: Tensor, mask: AttentionMask, backend: str) -> None:
    if not isinstance(qkv_BN3HD, Tensor):
        raise ValueError(f"qkv: {type(qkv_BN3HD).__name__} is not a tensor")
    if not isinstance(mask, AttentionMask):
        raise ValueError(f"mask: {type(mask).__name__} is not an AttentionMask")
    if qkv_BN3HD.ndim != 5 or qkv_BN3HD.shape[2] != 3:
        raise ValueError(f"qkv: shape {tuple(qkv_BN3HD.shape)} is not [B, N, 3, H, D]")
    if min(qkv_BN3HD.shape[3:]) < 1:  # torch's fused kernel divides by it
        raise ValueError(f"qkv: shape {tuple(qkv_BN3HD.shape)} has no heads or no width")
    if qkv_BN3HD.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"qkv: dtype {qkv_BN3HD.dtype} is not one of fp32, fp16, bf16, fp64")
    if qkv_BN3HD.shape[1] != mask.tokens:
        raise ValueError(f"mask: {mask.tokens} tokens, but qkv has {qkv_BN3HD.shape[1]}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if backend == "cpu" and qkv_BN3HD.device.type != "cpu":
        raise ValueError(f"backend: 'cpu' cannot run here: qkv is on {qkv_BN3HD.device}")


def quickest(qkv_BN3HD: Tensor, mask: AttentionMask) -> str:
    """The backend that "auto" stands for."""
    if qkv_BN3HD.device.type == "cpu":
        return "cpu" if cpu.pays(mask) else "reference"
    missing = unfit(qkv_BN3HD)
    if missing is None:
        return "triton"
    warn("sparse_attention falls back to dense masked attention (reference)", missing)
    return "reference"


def unfit(x_D: Tensor) -> str | None:
    """Why Triton kernels do not take a tensor of heads, of any leading shape; None if they do."""
    missing = triton_missing(x_D.device)
    if missing is None and x_D.dtype not in DTYPES:
        missing = f"dtype {x_D.dtype} is not one of fp32, fp16, bf16"
    if missing is None and x_D.shape[-1] not in WIDTHS:
        missing = f"head width {x_D.shape[-1]} is not one of {WIDTHS}"
    return missing


@lru_cache
def warn(what: str, missing: str) -> None:
    """Once per reason and process."""
    warnings.warn(f"{what}: {missing}", RuntimeWarning, stacklevel=4)
