"""Tile sizes by device and shape. No autotuning at run time: the same run takes the same kernels.

The choices follow what the offline compiler reports (`kernels/resources.json`): no spills on sm_90,
and two programs per multiprocessor where they fit. Units: tokens per tile.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from dalle_kernels.masks import AttentionMask


@dataclass(frozen=True)
class Tiles:
    """BM queries; BT text keys; BW image keys; warps and pipeline stages of one program."""

    BM: int
    BT: int
    BW: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k.isupper()}

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Forward(Tiles):
    """STRIDE query tiles per program; RESIDENT keeps up to 2 x BT text keys and values on chip."""

    STRIDE: int = 1
    RESIDENT: bool = False


@dataclass(frozen=True)
class Backward(Tiles):
    """BM is of queries in the dQ role; the dK, dV role walks BM queries per BT or BW keys."""


def forward_tiles(
    capability: tuple[int, int], mask: AttentionMask, width: int, dtype: torch.dtype
) -> Forward:
    """Tiles of the forward kernel on a device of that compute capability."""
    if dtype == torch.float32:
        return Forward(BM=32, BT=32, BW=32, num_warps=4, num_stages=1)
    if capability >= (9, 0) and width == 64 and 128 < mask.text <= 256 and mask.grid >= 16:
        # Half an image per program: each loads the text once for all its tiles, and two for every
        # head and sample are still more programs than a GPU has multiprocessors.
        stride = max(1, mask.image // 128)
        return Forward(64, 128, 32, num_warps=4, num_stages=1, STRIDE=stride, RESIDENT=True)
    if width == 128:
        return Forward(BM=64, BT=32, BW=32, num_warps=4, num_stages=2)
    return Forward(BM=64, BT=64, BW=32, num_warps=4, num_stages=2)


def backward_tiles(
    capability: tuple[int, int], mask: AttentionMask, width: int, dtype: torch.dtype
) -> Backward:
    """Tiles of the backward kernel on a device of that compute capability."""
    if dtype == torch.float32 and width == 128:
        return Backward(BM=16, BT=32, BW=32, num_warps=8, num_stages=1)
    if dtype == torch.float32:
        return Backward(BM=32, BT=32, BW=32, num_warps=4, num_stages=1)
    if width == 128:
        return Backward(BM=32, BT=64, BW=32, num_warps=8, num_stages=1)
    return Backward(BM=64, BT=64, BW=32, num_warps=4, num_stages=2)


def decode_warps(width: int, dtype: torch.dtype) -> int:
    """Warps of one program of the decode kernel."""
    return 8 if dtype == torch.float32 and width == 128 else 4
