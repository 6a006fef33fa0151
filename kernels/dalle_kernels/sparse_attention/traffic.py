"""Bytes that one launch of an attention kernel asks global memory for, from the masks' spans.

Counted are the lanes of loads and stores that are not masked off, each time that a program asks for
them: a key that four programs load counts four times, wherever it comes from. It is what L2 has to
serve; the memory behind it serves each byte at least once. The walk is that of the kernels, tile by
tile, and a test counts the interpreter's loads and stores against it.

Units: bytes of one head of one sample, unless it says otherwise; `size` is of a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dalle_kernels.masks import AttentionMask
from dalle_kernels.spans import span
from dalle_kernels.sparse_attention.triton_config import Tiles

FP32 = 4


def forward_bytes(mask: AttentionMask, tiles: Tiles, width: int, size: int) -> int:
    """q, k, v loaded, out and log-sum-exps stored."""
    row, total = width * size, 0
    for first in range(0, mask.text, tiles.BM):
        rows = min(tiles.BM, mask.text - first)
        keys = _walked(0, min(first + tiles.BM, mask.text), tiles.BT, mask.text)
        total += (2 * rows + 2 * keys) * row + rows * FP32
    for first in range(0, mask.image, tiles.BM):
        rows = min(tiles.BM, mask.image - first)
        keys = mask.text + _band_keys(mask, first, tiles)
        total += (2 * rows + 2 * keys) * row + rows * FP32
    return total


def backward_bytes(mask: AttentionMask, tiles: Tiles, width: int, size: int) -> int:
    """All of a backward pass: delta's own launch, then the roles of `attention_backward`."""
    row = width * size
    query = 2 * row + 2 * FP32  # q, its output's gradient, its log-sum-exp and delta
    total = mask.tokens * (2 * row + FP32)
    for keys, queries in _key_programs(mask, tiles):
        total += 4 * keys * row + queries * query
    for queries, keys in _query_programs(mask, tiles):
        total += queries * (query + row) + 2 * keys * row
    return total


def decode_bytes(
    mask: AttentionMask, samples: Sequence[int], block: int, width: int, size: int, splits: int = 1
) -> int:
    """One step, the mean over all positions: text once for every `block` samples of a caption,
    each sample's visible image keys, its new q (by each split), k and v loaded, k, v and out
    stored; of several splits, instead of out their parts."""
    blocks = sum(-(-count // block) for count in samples)
    pairs = int(mask.image_part().sum()) - mask.image  # its own key is met in registers
    rows = 2 * mask.text * blocks + (2 * pairs / mask.image + 4 + splits) * sum(samples)
    out = width * size if splits == 1 else splits * _part_bytes(width)
    return round(rows * width * size) + sum(samples) * out


def merge_bytes(width: int, size: int, splits: int) -> int:
    """A sample's parts loaded and out stored."""
    return splits * _part_bytes(width) + width * size


def _part_bytes(width: int) -> int:
    return (width + 2) * FP32  # weighted values, their maximum and sum


def _key_programs(mask: AttentionMask, tiles: Tiles) -> Iterator[tuple[int, int]]:
    """(keys, queries walked) of each program of the dK, dV roles."""
    band = span(mask)
    for first in range(0, mask.text, tiles.BT):
        text = _walked(first, mask.text, tiles.BM, mask.text)
        yield min(tiles.BT, mask.text - first), text + mask.image
    for first in range(0, mask.image, tiles.BW):
        last = min(first + tiles.BW, mask.image) - 1
        end = min(last + band.window + 1, mask.image)
        if band.same_line:
            end = (last // band.grid + 1) * band.grid
        yield last + 1 - first, _walked(first, end, tiles.BM, mask.image)


def _query_programs(mask: AttentionMask, tiles: Tiles) -> Iterator[tuple[int, int]]:
    """(queries, keys walked) of each program of the dQ roles."""
    for first in range(0, mask.text, tiles.BM):
        keys = _walked(0, min(first + tiles.BM, mask.text), tiles.BT, mask.text)
        yield min(tiles.BM, mask.text - first), keys
    for first in range(0, mask.image, tiles.BM):
        yield min(tiles.BM, mask.image - first), mask.text + _band_keys(mask, first, tiles)


def _band_keys(mask: AttentionMask, first: int, tiles: Tiles) -> int:
    """Image keys that a tile of queries walks."""
    band = span(mask)
    low = first // band.grid * band.grid if band.same_line else max(first - band.window, 0)
    return _walked(low, min(first + tiles.BM, mask.image), tiles.BW, mask.image)


def _walked(start: int, stop: int, step: int, length: int) -> int:
    """Rows loaded by whole tiles of `step` rows from `start`, the last of which reaches `stop`."""
    return min(start + -(-(stop - start) // step) * step, length) - start
