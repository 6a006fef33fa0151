"""What the Triton kernels share: the masks as rules on positions, and loads of token-major tiles.

Positions are those of `dalle_kernels.spans`: places in the order in which a mask is a band.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from dalle_kernels.masks import AttentionMask
from dalle_kernels.spans import span

OWN_LINE = tl.constexpr(0)
BAND = tl.constexpr(1)
CONV_PAPER = tl.constexpr(2)
CONV_CLAMP = tl.constexpr(3)
CONV_TORUS = tl.constexpr(4)
CONV_CORNER = tl.constexpr(5)

_CONV = {
    "paper": CONV_PAPER,
    "clamp": CONV_CLAMP,
    "torus": CONV_TORUS,
    "dalle-pytorch": CONV_CORNER,
}


def mask_constants(mask: AttentionMask) -> dict[str, Any]:
    """The kernels' compile-time constants of one mask."""
    band = span(mask)
    conv = mask.kind == "conv"
    rule = _CONV[mask.dialect] if conv else OWN_LINE if band.own_line else BAND
    corner = conv and mask.dialect == "dalle-pytorch"
    return {
        "TEXT": mask.text,
        "GRID": mask.grid,
        "BY_COLUMN": band.by_column,
        "BACK": band.back,
        "RULE": rule.value,
        "REACH": mask.kernel - 1 if corner else mask.kernel // 2,
    }


@triton.jit
def visible(q, k, GRID: tl.constexpr, BACK: tl.constexpr, RULE: tl.constexpr, REACH: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Whether image position q may look at image position k; both may lie outside the image."""
    d = q - k
    ok = (d >= 0) & (d <= BACK) & (k >= 0) & (q < GRID * GRID)
    if RULE == OWN_LINE:
        ok = ok & (q // GRID == k // GRID)
    elif RULE == CONV_PAPER:
        across = d % GRID
        ok = ok & (d // GRID <= REACH) & ((across <= REACH) | (across >= GRID - REACH))
    elif RULE != BAND:
        dr, dc = q // GRID - k // GRID, q % GRID - k % GRID
        if RULE == CONV_CORNER:
            ok = ok & (dr <= REACH) & (dc >= 0) & (dc <= REACH)
        else:
            dc = tl.abs(dc)
            if RULE == CONV_TORUS:
                dr, dc = tl.minimum(dr, GRID - dr), tl.minimum(dc, GRID - dc)
            ok = ok & (dr <= REACH) & (dc <= REACH)
    return ok


@triton.jit
def image_token(p, TEXT: tl.constexpr, GRID: tl.constexpr, BY_COLUMN: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Which of all states stands at image position p."""
    if BY_COLUMN:
        p = (p % GRID) * GRID + p // GRID
    return TEXT + p


@triton.jit
def load_rows(base, token, ok, stride, D: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """One head's [tokens, D] tile; zeros where not ok."""
    return tl.load(base + token[:, None] * stride + tl.arange(0, D)[None, :], ok[:, None], other=0)


@triton.jit
def store_rows(base, token, ok, stride, tile, D: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The inverse of `load_rows`, in the memory's dtype."""
    place = base + token[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(place, tile.to(base.dtype.element_ty), ok[:, None])
