"""Tiles of image keys, by what their band walks."""

import pytest
import torch
from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention.traffic import backward_bytes
from dalle_kernels.sparse_attention.triton_config import Tiles, backward_tiles

HOPPER = (9, 0)


@pytest.mark.parametrize(
    ("mask", "keys"),
    [
        (AttentionMask("row", 256, 32), 32),  # a reach of 96: 3 tiles of 32, or 2 of 64
        (AttentionMask("row", 256, 32, "dalle-pytorch"), 64),
        (AttentionMask("column", 256, 32), 64),
        (AttentionMask("conv", 256, 32), 64),  # 255: 8 of 32, or 4 of 64
        (AttentionMask("conv", 256, 32, "clamp"), 64),
        (AttentionMask("conv", 256, 32, "dalle-pytorch"), 32),  # 394: 13 of 32, or 7 of 64
    ],
    ids=str,
)
def test_hopper_takes_64_where_no_more_keys_are_walked(mask, keys):
    assert keys == backward_tiles(HOPPER, 64, torch.bfloat16, mask).BW


@pytest.mark.parametrize(("kind", "spared"), [("column", 0.055), ("conv", 0.1386)])
def test_tiles_of_64_load_queries_half_as_often(kind, spared):
    mask = AttentionMask(kind, 256, 32)
    narrow, wide = (
        backward_bytes(mask, Tiles(64, 64, keys, 4, 3, keys_first=True), 64, 2) for keys in (32, 64)
    )
    assert 1 - wide / narrow == pytest.approx(spared, abs=5e-4)


def test_older_gpus_and_other_widths_keep_32():
    mask = AttentionMask("conv", 256, 32)
    assert backward_tiles((8, 0), 64, torch.bfloat16, mask).BW == 32  # 64 would spill
    for width, dtype in ((128, torch.bfloat16), (64, torch.float32), (128, torch.float32)):
        assert backward_tiles(HOPPER, width, dtype, mask).BW == 32
