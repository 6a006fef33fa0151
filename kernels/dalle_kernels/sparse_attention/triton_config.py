"""Tile sizes by device and shape. No autotuning at run time: the same run takes the same kernels.

Those of bf16 at width 64 were measured on an H100 and an H200 (docs/log.md): under each of the
three masks they are within 6% of the quickest of 17 (forward) and within 4% of the quickest of 20
(backward). Tiles of 64 image keys were measured with half of the programs that a multiprocessor
holds since. The others follow what the offline compiler reports (`kernels/resources.json`): no
spills on sm_90, and two programs per multiprocessor where they fit. Units: tokens per tile.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from dalle_kernels.masks import AttentionMask
from dalle_kernels.spans import span


@dataclass(frozen=True)
class Tiles:
    """BM queries; BT text keys; BW image keys; warps and pipeline stages of one program.

    In the backward kernel BM is of queries in the dQ role; the dK, dV role walks BM queries per BT
    or BW keys. `keys_first`: it has the scores of text keys, and of image keys in tiles of 64, as
    [keys, queries], which spares Hopper two transpositions in shared memory; sm_80 would spill.
    """

    BM: int
    BT: int
    BW: int
    num_warps: int
    num_stages: int
    keys_first: bool = False

    def constants(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k.isupper()}

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def forward_tiles(width: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the forward kernel at that width of a head."""
    if dtype == torch.float32:
        return Tiles(BM=32, BT=32, BW=32, num_warps=8 if width == 128 else 4, num_stages=1)
    if width == 128:
        return Tiles(BM=64, BT=32, BW=32, num_warps=4, num_stages=2)
    return Tiles(BM=64, BT=64, BW=32, num_warps=4, num_stages=2)


def backward_tiles(
    capability: tuple[int, int], width: int, dtype: torch.dtype, mask: AttentionMask
) -> Tiles:
    """Tiles of the backward kernel at that width, on a device of that compute capability."""
    if dtype == torch.float32 and width == 128:
        return Tiles(BM=16, BT=32, BW=32, num_warps=8, num_stages=1)
    if dtype == torch.float32:
        return Tiles(BM=32, BT=32, BW=32, num_warps=4, num_stages=1)
    if width == 128:
        return Tiles(BM=32, BT=64, BW=32, num_warps=8, num_stages=1)
    if capability >= (9, 0):
        keys = _band_keys(mask, 64)
        return Tiles(BM=64, BT=64, BW=keys, num_warps=4, num_stages=3, keys_first=True)
    return Tiles(BM=64, BT=64, BW=32, num_warps=4, num_stages=2)


@lru_cache(maxsize=256)
def _band_keys(mask: AttentionMask, queries: int) -> int:
    """64 image keys per tile where tiles of 64 walk no more of the band than tiles of 32, else 32.

    Then it is the same work by half as many programs, which load queries half as often.
    """
    band, walked = span(mask), {32: 0, 64: 0}
    for first in range(0, band.image, queries):
        reach = min(first + queries, band.image) - band.first_key(first)
        for keys in walked:
            walked[keys] += -(-reach // keys) * keys
    return 64 if walked[64] <= walked[32] else 32


def decode_warps(width: int, dtype: torch.dtype) -> int:
    """Warps of one program of the decode kernel."""
    return 8 if dtype == torch.float32 and width == 128 else 4


def decode_splits(programs: int, text_tiles: int, multiprocessors: int) -> int:
    """Over how many programs the keys of each are split: 1, 2 or 4, and all get a tile of text.

    As many as leave at most two programs for each multiprocessor. So the paper's 62 heads are split
    for up to 32 samples of one caption, and above it nothing is paid for a merge. Not yet measured
    on a GPU.
    """
    splits = 1
    while splits < 4 and 2 * splits <= min(text_tiles, 2 * multiprocessors // programs):
        splits *= 2
    return splits
