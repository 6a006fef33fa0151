"""One entry point, several backends.

Shape suffixes: B batch, N states, H heads, D head width; 3 is query, key, value.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention import cpu, reference

BACKENDS: dict[str, Callable[[Tensor, AttentionMask], Tensor]] = {
    "reference": reference.attention,
    "cpu": cpu.attention,
}


def sparse_attention(qkv_BN3HD: Tensor, mask: AttentionMask, backend: str = "auto") -> Tensor:
    """Scaled dot-product attention where `mask` allows it: out_BNHD, differentiable.

    Args:
        qkv_BN3HD: queries, keys and values, token-major, any float dtype and device.
        mask: over exactly N states.
        backend: "reference" (dense boolean mask), "cpu" (skips what the mask hides), or "auto".

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if qkv_BN3HD.ndim != 5 or qkv_BN3HD.shape[2] != 3:
        raise ValueError(f"qkv: shape {tuple(qkv_BN3HD.shape)} is not [B, N, 3, H, D]")
    if qkv_BN3HD.shape[1] != mask.tokens:
        raise ValueError(f"mask: {mask.tokens} states, but qkv has {qkv_BN3HD.shape[1]}")
    if backend == "auto":
        backend = "cpu" if qkv_BN3HD.device.type == "cpu" and cpu.pays(mask) else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](qkv_BN3HD, mask)
