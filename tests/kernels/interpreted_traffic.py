"""Bytes that `traffic.py` says against those that the interpreter loads and stores."""

import pytest
import torch
from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention import (
    sparse_attention,
    traffic,
    triton_attention,
    triton_decode,
)
from dalle_kernels.sparse_attention.triton_config import Tiles
from decoding import decode
from toy_masks import RULES, registered
from triton.runtime import interpreter

WIDTH, SIZE = 32, 4  # of fp32
TILES = Tiles(BM=32, BT=16, BW=16, num_warps=4, num_stages=1)
MASKS = [
    AttentionMask("row", 18, 6),
    AttentionMask("column", 40, 5),
    AttentionMask("conv", 16, 8, kernel=3),
    AttentionMask("row", 33, 8, "dalle-pytorch"),
]


class Counter:
    """Bytes of all lanes of tensors that are not masked off; lone scalars are left out."""

    moved = 0

    def count(self, pointers, mask):
        if mask.data.size > 1:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            self.moved += int(mask.data.sum()) * size


@pytest.fixture
def counter(monkeypatch):
    found, builder = Counter(), interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, pointers, mask, *rest):
        found.count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        found.count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    return found


def assert_training_moves_what_is_said(mask, counter, monkeypatch):
    for name in ("forward_tiles", "backward_tiles"):
        monkeypatch.setattr(triton_attention, name, lambda *_: TILES)
    qkv = torch.randn(2, mask.tokens, 3, 1, WIDTH, requires_grad=True)
    out = sparse_attention(qkv, mask, "triton")
    assert counter.moved == 2 * traffic.forward_bytes(mask, TILES, WIDTH, SIZE)
    counter.moved = 0
    out.sum().backward()
    assert counter.moved == 2 * traffic.backward_bytes(mask, TILES, WIDTH, SIZE)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_training(mask, counter, monkeypatch):
    assert_training_moves_what_is_said(mask, counter, monkeypatch)


@pytest.mark.parametrize("kind", RULES)
def test_training_under_a_new_mask(kind, counter, monkeypatch):
    mask = registered(monkeypatch, kind, 18, 5)
    assert_training_moves_what_is_said(mask, counter, monkeypatch)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_decoding(kind, splits, counter, monkeypatch):
    mask, samples = AttentionMask(kind, 18 if splits == 1 else 70, 4, kernel=3), [2, 18]
    monkeypatch.setattr(triton_decode, "decode_splits", lambda *_: splits)
    decode(mask, samples, torch.float32, "triton", heads=2, width=WIDTH)
    step = traffic.decode_bytes(mask, samples, triton_decode.BLOCK, WIDTH, SIZE, splits)
    if splits > 1:
        step += sum(samples) * traffic.merge_bytes(WIDTH, SIZE, splits)
    assert counter.moved == pytest.approx(2 * step * mask.image, rel=1e-4)  # `step` is rounded
