"""One new image token per sample on a GPU: a program is a caption, a head and some of its samples.

The text's keys are loaded once per block and meet all its queries in one product; image keys are
each sample's own, a few dozen, and are multiplied and summed without matrix units.

Few programs leave most of a GPU idle. Then the keys are split over several, tile by tile in turn,
each writes its part of the softmax, and a second kernel merges the parts in their order.
"""
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels.devices import launching, multiprocessors
from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention.triton_config import decode_splits, decode_warps
from dalle_kernels.sparse_attention.triton_tiles import (
    load_rows,
    mask_constants,
    store_rows,
    visible,
)

BLOCK = 16  # samples: the least rows of a matrix product


def extend(
    at: Tensor,
    q_BHD: Tensor,
    k_BHD: Tensor,
    v_BHD: Tensor,
    kept: tuple[Tensor, Tensor, Tensor, Tensor],
    first_C: Tensor,
    samples: Sequence[int],
    mask: AttentionMask,
) -> Tensor:
    """out_BHD; see `DecodeCache.extend`.

    Args:
        at: int64, the raster position; on the device, so that a CUDA graph can be replayed for
            all positions.
        q_BHD, k_BHD, v_BHD: of one tensor, read where they lie; a sample's heads are contiguous.
        kept: k_CHTD, v_CHTD, k_BHJD, v_BHJD, contiguous.
        first_C: int64 [C + 1], the first sample of each caption, and one past the last.
        samples: of each caption.
    """
    count, heads, width = q_BHD.shape
    new = [q_BHD, k_BHD, v_BHD]
    if {x_BHD.stride() for x_BHD in new} != {(q_BHD.stride(0), width, 1)}:
        new = [x_BHD.contiguous() for x_BHD in new]
    out_BHD = torch.empty(q_BHD.shape, dtype=q_BHD.dtype, device=q_BHD.device)
    constants = decode_constants(mask, kept[2].shape[2], width)
    blocks = [triton.cdiv(number, BLOCK) for number in samples]
    text_tiles = triton.cdiv(mask.text, constants["BT"])
    splits = decode_splits(heads * sum(blocks), text_tiles, multiprocessors(q_BHD.device))
    parts = _parts(count * heads, splits, q_BHD) if splits > 1 else (None, None, None)
    grid = (heads, max(blocks) * splits, len(samples))
    with launching(q_BHD):
        attention_decode[grid](
            at, *new, new[0].stride(0), *kept, out_BHD, *parts, first_C,
            math.log2(math.e) / math.sqrt(width),
            **constants, SPLITS=splits, num_warps=decode_warps(width, q_BHD.dtype),
        )  # fmt: skip
        if splits > 1:
            merge_decoded[(triton.cdiv(count * heads, BLOCK),)](
                *parts, out_BHD, count * heads, SPLITS=splits, D=width, ROWS=BLOCK
            )
    return out_BHD


def _parts(rows: int, splits: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for each split's maximum, sum and weighted values, in fp32; a row is a sample's head.

    Taken for the call, as its output is: a CUDA graph then has one for all layers.
    """
    top, total = (like.new_empty(rows, splits, dtype=torch.float32) for _ in range(2))
    return top, total, like.new_empty(rows, splits, like.shape[-1], dtype=torch.float32)


def decode_constants(mask: AttentionMask, slots: int, width: int) -> dict[str, Any]:
    """The kernel's compile-time constants: the mask's, and tiles of samples, text and slots."""
    # Measured on an H200 at width 64 (docs/log.md): more slots at a time are slower.
    tiles = {"BS": BLOCK, "BT": 32 if width > 64 else 64, "BJ": 256 // max(width, 64)}
    return {**mask_constants(mask), "SLOTS": slots, "D": width, **tiles}


@triton.jit(do_not_specialize_on_alignment=["at"])
def attention_decode(
    at, q, k_new, v_new, stride_b, k_text, v_text, k_image, v_image, out,
    part_top, part_total, part_values, first_C, scale,
    TEXT: tl.constexpr, GRID: tl.constexpr, BY_COLUMN: tl.constexpr, WINDOW: tl.constexpr,
    SAME_ROW: tl.constexpr, RULE: tl.constexpr, RADIUS: tl.constexpr, SLOTS: tl.constexpr,
    D: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    head, heads, caption = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    block, split = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    first = tl.load(first_C + caption) + block * BS
    end = tl.load(first_C + caption + 1)
    sample = first + tl.arange(0, BS)
    ok = sample < end
    scan = tl.load(at).to(tl.int32)
    if BY_COLUMN:
        scan = (scan % GRID) * GRID + scan // GRID
    row = sample * heads + head
    own, ring = scan % SLOTS, row * SLOTS
    queries = load_rows(q + head * D, sample, ok, stride_b, D)
    text = (caption * heads + head) * TEXT * D
    acc = tl.zeros([BS, D], tl.float32)
    top, total = tl.full([BS], float("-inf"), tl.float32), tl.zeros([BS], tl.float32)
    for begin in range(split * BT, TEXT, BT * SPLITS):  # a tile at least: `top` is finite after it
        key = begin + tl.arange(0, BT)
        # Where another caption has more samples a block may have none, and loads no text. As wide
        # as its peer: the interpreter turns a lone scalar's verdict into integers.
        there = (key < TEXT) & (first + tl.zeros_like(key) < end)
        k = load_rows(k_text + text, key, there, D, D)
        v = load_rows(v_text + text, key, there, D, D)
        s = tl.dot(queries, tl.trans(k), input_precision="ieee")
        s = tl.where((key < TEXT)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        p, shrink = tl.exp2(tl.fma(s, scale, -new_top[:, None])), tl.exp2(top - new_top)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top, total = new_top, total * shrink + tl.sum(p, 1)
    wide, lane = queries.to(tl.float32) * scale, tl.arange(0, D)[None, None, :]
    start, stop = 0, tl.minimum(scan + 1, SLOTS)
    if SAME_ROW:  # a line starts at a multiple of the slots, or all lines are kept
        start = tl.maximum(scan // GRID * GRID, scan - WINDOW) % SLOTS
        stop = own + 1
    for begin in range(start + split * BJ, stop, BJ * SPLITS):
        slot = begin + tl.arange(0, BJ)
        # Which scan position the slot holds: the last one up to now that falls on it.
        held = scan - (own - slot + SLOTS) % SLOTS
        now = scan + tl.zeros_like(slot)
        seen = (slot < stop) & (slot != own) & visible(now, held, GRID, WINDOW, RULE, RADIUS)
        offsets = (ring[:, None] + slot[None, :])[:, :, None] * D + lane
        there = (ok[:, None] & seen[None, :])[:, :, None]
        k = tl.load(k_image + offsets, there, other=0).to(tl.float32)
        v = tl.load(v_image + offsets, there, other=0).to(tl.float32)
        s = tl.where(seen[None, :], tl.sum(wide[:, None, :] * k, 2), float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p, shrink = tl.exp2(s - new_top[:, None]), tl.exp2(top - new_top)
        acc = acc * shrink[:, None] + tl.sum(p[:, :, None] * v, 1)
        top, total = new_top, total * shrink + tl.sum(p, 1)
    # Every token sees itself, and from registers: what a program stores it may not load at once.
    # One split does it, and stores; the others read no slot that it writes.
    mine = ok & (split + tl.zeros_like(sample) == 0)
    k_own = load_rows(k_new + head * D, sample, mine, stride_b, D)
    v_own = load_rows(v_new + head * D, sample, mine, stride_b, D)
    store_rows(k_image, ring + own, mine, D, k_own, D)
    store_rows(v_image, ring + own, mine, D, v_own, D)
    s = tl.sum(wide * k_own.to(tl.float32), 1)
    if SPLITS > 1:
        s = tl.where(mine, s, float("-inf"))
    new_top = tl.maximum(top, s)
    p, shrink = tl.exp2(s - new_top), tl.exp2(top - new_top)
    acc = acc * shrink[:, None] + p[:, None] * v_own.to(tl.float32)
    total = total * shrink + p
    if SPLITS == 1:
        store_rows(out + head * D, sample, ok, heads * D, acc * (1 / total)[:, None], D)
    else:
        part = row * SPLITS + split
        tl.store(part_top + part, new_top, ok)
        tl.store(part_total + part, total, ok)
        store_rows(part_values, part, ok, D, acc, D)


@triton.jit
def merge_decoded(
    part_top, part_total, part_values, out, rows,
    SPLITS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One softmax of the parts that the splits of `attention_decode` left, first to last."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    acc = tl.zeros([ROWS, D], tl.float32)
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    for split in range(SPLITS):
        part = row * SPLITS + split
        part_s = tl.load(part_top + part, ok, other=0)
        new_top = tl.maximum(top, part_s)
        p, shrink = tl.exp2(part_s - new_top), tl.exp2(top - new_top)
        values = load_rows(part_values, part, ok, D, D)
        acc = acc * shrink[:, None] + values * p[:, None]
        top, total = new_top, total * shrink + tl.load(part_total + part, ok, other=1) * p
    store_rows(out, row, ok, D, acc * (1 / total)[:, None], D)
