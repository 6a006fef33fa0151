"""The forward kernel: query tiles stream past all text keys and the few image keys of their span.

One program is one head of one sample and one tile of queries. Heads are the fastest axis of the
grid, so that neighbouring programs read neighbouring lines of the same tokens.
"""
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels.devices import launching
from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention.triton_config import Tiles
from dalle_kernels.sparse_attention.triton_tiles import (
    image_token,
    load_rows,
    mask_constants,
    store_rows,
    visible,
)


def forward(qkv_BN3HD: Tensor, mask: AttentionMask, config: Tiles) -> tuple[Tensor, Tensor]:
    """(out_BNHD, lse_BHN): the log-sum-exp of the scaled scores in base 2, fp32."""
    batch, tokens, _, heads, width = qkv_BN3HD.shape
    out_BNHD = torch.empty_like(qkv_BN3HD[:, :, 0], memory_format=torch.contiguous_format)
    lse_BHN = qkv_BN3HD.new_empty(batch, heads, tokens, dtype=torch.float32)
    tiles = triton.cdiv(mask.image, config.BM) + triton.cdiv(mask.text, config.BM)
    with launching(qkv_BN3HD):
        attention_forward[(heads, tiles, batch)](
            qkv_BN3HD, out_BNHD, lse_BHN,
            *qkv_BN3HD.stride()[:4], math.log2(math.e) / math.sqrt(width),
            **mask_constants(mask), D=width, **config.constants(), **config.options(),
        )  # fmt: skip
    return out_BNHD, lse_BHN


@triton.jit
def _update(acc, top, total, q, k, v, ok, scale):
    """One tile of keys into the running softmax; ok None means that every key counts."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if ok is not None:
        s = tl.where(ok, s, float("-inf"))
    # Rows are scaled for the maximum, single scores only in the sum that is their exponent.
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    shrink = tl.exp2(top - new_top)
    p = tl.exp2(tl.fma(s, scale, -new_top[:, None]))
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_top, total * shrink + tl.sum(p, 1)


@triton.jit
def _text_queries(
    q_base, k_base, v_base, out, lse, stride, out_stride, scale, first,
    TEXT: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BM)
    q = load_rows(q_base, row, row < TEXT, stride, D)
    acc = tl.zeros([BM, D], tl.float32)
    top, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    for start in range(0, tl.minimum(first + BM, TEXT), BT):
        key = start + tl.arange(0, BT)
        k = load_rows(k_base, key, key < TEXT, stride, D)
        v = load_rows(v_base, key, key < TEXT, stride, D)
        ok = row[:, None] >= key[None, :]
        acc, top, total = _update(acc, top, total, q, k, v, ok, scale)
    store_rows(out, row, row < TEXT, out_stride, acc * (1 / total)[:, None], D)
    tl.store(lse + row, top + tl.log2(total), row < TEXT)


@triton.jit
def attention_forward(
    qkv, out, lse, stride_b, stride_n, stride_c, stride_h, scale,
    TEXT: tl.constexpr, GRID: tl.constexpr, BY_COLUMN: tl.constexpr, WINDOW: tl.constexpr,
    SAME_ROW: tl.constexpr, RULE: tl.constexpr, RADIUS: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    IMAGE: tl.constexpr = GRID * GRID
    PROGRAMS: tl.constexpr = (IMAGE + BM - 1) // BM
    head, tile, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(0)
    q_base = qkv + sample * stride_b + head * stride_h
    k_base, v_base = q_base + stride_c, q_base + 2 * stride_c
    out += (sample * (TEXT + IMAGE) * heads + head) * D
    lse += (sample * heads + head) * (TEXT + IMAGE)
    if tile >= PROGRAMS:
        first = (tile - PROGRAMS) * BM
        _text_queries(
            q_base, k_base, v_base, out, lse, stride_n, heads * D, scale, first, TEXT, D, BM, BT
        )
        return

    first = tile * BM
    query = first + tl.arange(0, BM)
    row = image_token(query, TEXT, GRID, BY_COLUMN)
    q = load_rows(q_base, row, query < IMAGE, stride_n, D)
    acc = tl.zeros([BM, D], tl.float32)
    top, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    for start in range(0, TEXT, BT):
        key = start + tl.arange(0, BT)
        k = load_rows(k_base, key, key < TEXT, stride_n, D)
        v = load_rows(v_base, key, key < TEXT, stride_n, D)
        ok = None if TEXT % BT == 0 else (key < TEXT)[None, :]
        acc, top, total = _update(acc, top, total, q, k, v, ok, scale)
    # From the first scan position in the window, or the first of the tile's own lines.
    low = tl.maximum(first - WINDOW, 0)
    if SAME_ROW:
        low = first // GRID * GRID
    for start in range(low, tl.minimum(first + BM, IMAGE), BW):
        key = start + tl.arange(0, BW)
        column = image_token(key, TEXT, GRID, BY_COLUMN)
        k = load_rows(k_base, column, key < IMAGE, stride_n, D)
        v = load_rows(v_base, column, key < IMAGE, stride_n, D)
        ok = visible(query[:, None], key[None, :], GRID, WINDOW, RULE, RADIUS)
        acc, top, total = _update(acc, top, total, q, k, v, ok, scale)
    store_rows(out, row, query < IMAGE, heads * D, acc * (1 / total)[:, None], D)
    tl.store(lse + row, top + tl.log2(total), query < IMAGE)
