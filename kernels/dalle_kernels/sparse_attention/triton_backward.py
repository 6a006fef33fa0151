"""The backward kernel: one launch, two roles, no atomics, so that equal inputs give equal bits.

Roles along the second axis of the grid: dK and dV of text keys, which every later query looks at
and which take longest; dK and dV of image keys; dQ of image queries; dQ of text queries. Each tile
of dqkv_BN3HD is written once, by one program. Probabilities are recomputed from the saved
log-sum-exp.
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


def backward(
    grad_BNHD: Tensor,
    qkv_BN3HD: Tensor,
    out_BNHD: Tensor,
    lse_BHN: Tensor,
    mask: AttentionMask,
    config: Tiles,
) -> Tensor:
    """The gradient of qkv, token-major and contiguous; grad_BNHD and out_BNHD are contiguous."""
    batch, tokens, _, heads, width = qkv_BN3HD.shape
    delta_BHN = torch.empty_like(lse_BHN)
    with launching(qkv_BN3HD):
        attention_delta[(heads, triton.cdiv(tokens, 64), batch)](
            grad_BNHD, out_BNHD, delta_BHN, tokens, D=width, BM=64, num_warps=4
        )
    dqkv_BN3HD = torch.empty_like(qkv_BN3HD, memory_format=torch.contiguous_format)
    text, image = mask.text, mask.image
    tiles = sum(
        triton.cdiv(length, tile)
        for length, tile in (
            (text, config.BT), (image, config.BM), (image, config.BW), (text, config.BM)
        )
    )  # fmt: skip
    with launching(qkv_BN3HD):
        attention_backward[(heads, tiles, batch)](
            qkv_BN3HD, grad_BNHD, lse_BHN, delta_BHN, dqkv_BN3HD,
            *qkv_BN3HD.stride()[:4], 1 / math.sqrt(width),
            **mask_constants(mask), D=width, KEYS_FIRST=config.keys_first,
            **config.constants(), **config.options(),
        )  # fmt: skip
    return dqkv_BN3HD


@triton.jit
def attention_delta(grad, out, delta, tokens, D: tl.constexpr, BM: tl.constexpr):
    """delta = rowsum(grad * out), fp32: what every score's gradient has subtracted."""
    head, sample, heads = tl.program_id(0), tl.program_id(2).to(tl.int64), tl.num_programs(0)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    ok, base = row < tokens, (sample * tokens * heads + head) * D
    g = load_rows(grad + base, row, ok, heads * D, D).to(tl.float32)
    o = load_rows(out + base, row, ok, heads * D, D).to(tl.float32)
    tl.store(delta + (sample * heads + head) * tokens + row, tl.sum(g * o, 1), ok)


@triton.jit
def _weights(q, k, g, v, lse, delta, ok, scale):
    """(p, ds) of one [queries, keys] tile; ok None means that every pair counts."""
    log2e: tl.constexpr = 1.4426950408889634
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(tl.fma(s, scale * log2e, -lse[:, None]))
    if ok is not None:
        p = tl.where(ok, p, 0.0)
    dp = tl.dot(g, tl.trans(v), input_precision="ieee")
    return p, p * (dp - delta[:, None])


@triton.jit
def _add_dkv(dk, dv, q, k, g, v, lse, delta, ok, scale):
    p, ds = _weights(q, k, g, v, lse, delta, ok, scale)
    dv = tl.dot(tl.trans(p.to(g.dtype)), g, dv, input_precision="ieee")
    dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _add_dkv_transposed(dk, dv, q, k, g, v, lse, delta, ok, scale):
    """The same by [keys, queries] tiles, `ok` too: p and ds are operands as they are."""
    log2e: tl.constexpr = 1.4426950408889634
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    p = tl.exp2(tl.fma(s, scale * log2e, -lse[None, :]))
    if ok is not None:
        p = tl.where(ok, p, 0.0)
    dp = tl.dot(v, tl.trans(g), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _add_dq(dq, q, k, g, v, lse, delta, ok, scale):
    _, ds = _weights(q, k, g, v, lse, delta, ok, scale)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _load_queries(q_base, grad, lse, delta, row, ok, stride, grad_stride, D: tl.constexpr):
    q = load_rows(q_base, row, ok, stride, D)
    g = load_rows(grad, row, ok, grad_stride, D)
    return q, g, tl.load(lse + row, ok, other=0.0), tl.load(delta + row, ok, other=0.0)


@triton.jit
def _text_keys(
    q_base, k_base, v_base, grad, lse, delta, dk_base, dv_base, stride, grad_stride, out_stride,
    scale, first, TEXT: tl.constexpr, IMAGE: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    key = first + tl.arange(0, BT)
    k = load_rows(k_base, key, key < TEXT, stride, D)
    v = load_rows(v_base, key, key < TEXT, stride, D)
    dk, dv = tl.zeros([BT, D], tl.float32), tl.zeros([BT, D], tl.float32)
    for start in range(first, TEXT, BM):
        row = start + tl.arange(0, BM)
        q, g, m, d = _load_queries(
            q_base, grad, lse, delta, row, row < TEXT, stride, grad_stride, D
        )
        if KEYS_FIRST:
            ok = (row[None, :] >= key[:, None]) & (row < TEXT)[None, :]
            dk, dv = _add_dkv_transposed(dk, dv, q, k, g, v, m, d, ok, scale)
        else:
            ok = (row[:, None] >= key[None, :]) & (row < TEXT)[:, None]
            dk, dv = _add_dkv(dk, dv, q, k, g, v, m, d, ok, scale)
    for start in range(TEXT, TEXT + IMAGE, BM):
        row = start + tl.arange(0, BM)
        inside = row < TEXT + IMAGE
        q, g, m, d = _load_queries(q_base, grad, lse, delta, row, inside, stride, grad_stride, D)
        if KEYS_FIRST:
            ok = None if IMAGE % BM == 0 else inside[None, :]
            dk, dv = _add_dkv_transposed(dk, dv, q, k, g, v, m, d, ok, scale)
        else:
            ok = None if IMAGE % BM == 0 else inside[:, None]
            dk, dv = _add_dkv(dk, dv, q, k, g, v, m, d, ok, scale)
    store_rows(dk_base, key, key < TEXT, out_stride, dk * scale, D)
    store_rows(dv_base, key, key < TEXT, out_stride, dv, D)


@triton.jit
def _image_keys(
    q_base, k_base, v_base, grad, lse, delta, dk_base, dv_base, stride, grad_stride, out_stride,
    scale, first, TEXT: tl.constexpr, GRID: tl.constexpr, BY_COLUMN: tl.constexpr,
    WINDOW: tl.constexpr, SAME_ROW: tl.constexpr, RULE: tl.constexpr, RADIUS: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    IMAGE: tl.constexpr = GRID * GRID
    key = first + tl.arange(0, BW)
    column = image_token(key, TEXT, GRID, BY_COLUMN)
    k = load_rows(k_base, column, key < IMAGE, stride, D)
    v = load_rows(v_base, column, key < IMAGE, stride, D)
    dk, dv = tl.zeros([BW, D], tl.float32), tl.zeros([BW, D], tl.float32)
    last = tl.minimum(first + BW, IMAGE) - 1
    end = last + WINDOW + 1
    if SAME_ROW:
        end = (last // GRID + 1) * GRID
    for start in range(first, tl.minimum(end, IMAGE), BM):
        query = start + tl.arange(0, BM)
        row = image_token(query, TEXT, GRID, BY_COLUMN)
        q, g, m, d = _load_queries(
            q_base, grad, lse, delta, row, query < IMAGE, stride, grad_stride, D
        )
        if KEYS_FIRST and BW >= 64:  # fewer are no rows of Hopper's products
            ok = visible(query[None, :], key[:, None], GRID, WINDOW, RULE, RADIUS)
            dk, dv = _add_dkv_transposed(dk, dv, q, k, g, v, m, d, ok, scale)
        else:
            ok = visible(query[:, None], key[None, :], GRID, WINDOW, RULE, RADIUS)
            dk, dv = _add_dkv(dk, dv, q, k, g, v, m, d, ok, scale)
    store_rows(dk_base, column, key < IMAGE, out_stride, dk * scale, D)
    store_rows(dv_base, column, key < IMAGE, out_stride, dv, D)


@triton.jit
def _text_queries(
    q_base, k_base, v_base, grad, lse, delta, dq_base, stride, grad_stride, out_stride,
    scale, first, TEXT: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BM)
    q, g, m, d = _load_queries(q_base, grad, lse, delta, row, row < TEXT, stride, grad_stride, D)
    dq = tl.zeros([BM, D], tl.float32)
    for start in range(0, tl.minimum(first + BM, TEXT), BT):
        key = start + tl.arange(0, BT)
        k = load_rows(k_base, key, key < TEXT, stride, D)
        v = load_rows(v_base, key, key < TEXT, stride, D)
        dq = _add_dq(dq, q, k, g, v, m, d, row[:, None] >= key[None, :], scale)
    store_rows(dq_base, row, row < TEXT, out_stride, dq * scale, D)


@triton.jit
def _image_queries(
    q_base, k_base, v_base, grad, lse, delta, dq_base, stride, grad_stride, out_stride,
    scale, first, TEXT: tl.constexpr, GRID: tl.constexpr, BY_COLUMN: tl.constexpr,
    WINDOW: tl.constexpr, SAME_ROW: tl.constexpr, RULE: tl.constexpr, RADIUS: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    IMAGE: tl.constexpr = GRID * GRID
    query = first + tl.arange(0, BM)
    row = image_token(query, TEXT, GRID, BY_COLUMN)
    q, g, m, d = _load_queries(q_base, grad, lse, delta, row, query < IMAGE, stride, grad_stride, D)
    dq = tl.zeros([BM, D], tl.float32)
    for start in range(0, TEXT, BT):
        key = start + tl.arange(0, BT)
        k = load_rows(k_base, key, key < TEXT, stride, D)
        v = load_rows(v_base, key, key < TEXT, stride, D)
        ok = None if TEXT % BT == 0 else (key < TEXT)[None, :]
        dq = _add_dq(dq, q, k, g, v, m, d, ok, scale)
    low = tl.maximum(first - WINDOW, 0)
    if SAME_ROW:
        low = first // GRID * GRID
    for start in range(low, tl.minimum(first + BM, IMAGE), BW):
        key = start + tl.arange(0, BW)
        column = image_token(key, TEXT, GRID, BY_COLUMN)
        k = load_rows(k_base, column, key < IMAGE, stride, D)
        v = load_rows(v_base, column, key < IMAGE, stride, D)
        ok = visible(query[:, None], key[None, :], GRID, WINDOW, RULE, RADIUS)
        dq = _add_dq(dq, q, k, g, v, m, d, ok, scale)
    store_rows(dq_base, row, query < IMAGE, out_stride, dq * scale, D)


@triton.jit
def attention_backward(
    qkv, grad, lse, delta, dqkv, stride_b, stride_n, stride_c, stride_h, scale,
    TEXT: tl.constexpr, GRID: tl.constexpr, BY_COLUMN: tl.constexpr, WINDOW: tl.constexpr,
    SAME_ROW: tl.constexpr, RULE: tl.constexpr, RADIUS: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    IMAGE: tl.constexpr = GRID * GRID
    TEXT_KEYS: tl.constexpr = (TEXT + BT - 1) // BT
    IMAGE_KEYS: tl.constexpr = TEXT_KEYS + (IMAGE + BW - 1) // BW
    IMAGE_QUERIES: tl.constexpr = IMAGE_KEYS + (IMAGE + BM - 1) // BM
    head, tile, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads, tokens = tl.num_programs(0), TEXT + IMAGE
    q = qkv + sample * stride_b + head * stride_h
    k, v = q + stride_c, q + 2 * stride_c
    grad += (sample * tokens * heads + head) * D
    lse += (sample * heads + head) * tokens
    delta += (sample * heads + head) * tokens
    dq = dqkv + (sample * tokens * 3 * heads + head) * D
    dk, dv = dq + heads * D, dq + 2 * heads * D
    g_stride, d_stride = heads * D, 3 * heads * D
    # Triton lays out shared memory by the order of these cases: with image queries second, 64 image
    # keys take 145 KiB and not 98, and a Hopper multiprocessor holds one program instead of two.
    if tile < TEXT_KEYS:
        _text_keys(
            q, k, v, grad, lse, delta, dk, dv, stride_n, g_stride, d_stride, scale, tile * BT,
            TEXT, IMAGE, D, BM, BT, KEYS_FIRST,
        )  # fmt: skip
    elif tile < IMAGE_KEYS:
        _image_keys(
            q, k, v, grad, lse, delta, dk, dv, stride_n, g_stride, d_stride, scale,
            (tile - TEXT_KEYS) * BW, TEXT, GRID, BY_COLUMN, WINDOW, SAME_ROW, RULE, RADIUS,
            D, BM, BW, KEYS_FIRST,
        )  # fmt: skip
    elif tile < IMAGE_QUERIES:
        _image_queries(
            q, k, v, grad, lse, delta, dq, stride_n, g_stride, d_stride, scale,
            (tile - IMAGE_KEYS) * BM, TEXT, GRID, BY_COLUMN, WINDOW, SAME_ROW, RULE, RADIUS,
            D, BM, BT, BW,
        )  # fmt: skip
    else:
        _text_queries(
            q, k, v, grad, lse, delta, dq, stride_n, g_stride, d_stride, scale,
            (tile - IMAGE_QUERIES) * BM, TEXT, D, BM, BT,
        )  # fmt: skip
