"""What the Triton kernels share: a mask's rule within its span, and loads of token-major tiles.

Image tokens are named by their scan positions (`dalle_kernels.spans`).
"""
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from dalle_kernels.masks import AttentionMask
from dalle_kernels.spans import span


def mask_constants(mask: AttentionMask) -> dict[str, Any]:
    """The kernels' compile-time constants of one mask; its rule is compiled into them."""
    band = span(mask)
    return {
        "TEXT": mask.text,
        "GRID": mask.grid,
        "BY_COLUMN": band.by_column,
        "WINDOW": band.window,
        "SAME_ROW": band.same_line,
        "RULE": _compilable(mask.rule.visible),
        "RADIUS": mask.radius,
    }


@lru_cache(maxsize=256)
def _compilable(rule: Callable[..., Any]) -> Any:
    """The rule as the kernels can call it; Triton's interpreter calls plain Python."""
    return triton.jit(rule) if isinstance(image_token, triton.JITFunction) else rule


@triton.jit
def visible(
    q, k, GRID: tl.constexpr, WINDOW: tl.constexpr, RULE: tl.constexpr, RADIUS: tl.constexpr
):
    """Whether scan position q may look at scan position k; both may lie outside the image."""
    d = q - k
    inside = (d >= 0) & (d <= WINDOW) & (k >= 0) & (q < GRID * GRID)
    return inside & RULE(q, k, GRID, RADIUS)


@triton.jit
def image_token(p, TEXT: tl.constexpr, GRID: tl.constexpr, BY_COLUMN: tl.constexpr):
    """Which of all tokens stands at scan position p."""
    if BY_COLUMN:
        p = (p % GRID) * GRID + p // GRID
    return TEXT + p


@triton.jit
def load_rows(base, token, ok, stride, D: tl.constexpr):
    """One head's [tokens, D] tile; zeros where not ok."""
    return tl.load(base + token[:, None] * stride + tl.arange(0, D)[None, :], ok[:, None], other=0)


@triton.jit
def store_rows(base, token, ok, stride, tile, D: tl.constexpr):
    """The inverse of `load_rows`, in the memory's dtype."""
    pointers = base + token[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), ok[:, None])
