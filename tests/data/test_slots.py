"""Micro-batches through memory without a name."""

from typing import NamedTuple

import pytest
import torch
from torch.utils.data import Dataset

from dalle_dist.data import slots
from dalle_dist.data.loader import batches
from dalle_dist.data.slots import Slots


class Batch(NamedTuple):
    rows: torch.Tensor
    keys: list[str]
    none: torch.Tensor


def made(i, size=1000):
    return Batch(torch.full((3, size), i), [f"key {i}"], torch.empty(0, dtype=torch.uint8))


def assert_equal(found, wanted):
    assert type(found) is Batch and found.keys == wanted.keys
    assert torch.equal(found.rows, wanted.rows) and torch.equal(found.none, wanted.none)


def test_what_is_unpacked_is_its_own_and_outlives_its_slot():
    memory = Slots(workers=1, ahead=2)
    packed = [memory.pack(0, made(i)) for i in range(3)]
    assert all(len(one.data) < 600 for one in packed), "tensors are not in the pickle"
    first = memory.unpack(packed[0])
    memory.pack(0, made(9))  # into the slot of the first
    assert_equal(first, made(0))
    first.rows[0, 0] = 5
    for i in (1, 2):
        assert_equal(memory.unpack(packed[i]), made(i))


def test_tensors_keep_their_layout_and_go_by_the_slot():
    memory = Slots(workers=1, ahead=0)
    rows = torch.arange(2 * 3 * 40 * 50).view(2, 40, 50, 3)
    for tensor in (rows.permute(0, 3, 1, 2), rows, rows[0, 0, 0, 0], rows.permute(3, 2, 1, 0)):
        packed = memory.pack(0, tensor)
        found = memory.unpack(packed)
        assert torch.equal(found, tensor) and found.stride() == tensor.stride()
        assert len(packed.data) < 400
    part = rows[:, ::2]
    assert torch.equal(memory.unpack(memory.pack(0, part)), part)


def test_processes_have_slots_of_their_own():
    memory = Slots(workers=2, ahead=0)
    ours, theirs = memory.pack(0, made(1)), memory.pack(1, made(2))
    assert_equal(memory.unpack(ours), made(1))
    assert_equal(memory.unpack(theirs), made(2))


def test_what_does_not_fit_goes_with_the_pickle(monkeypatch):
    monkeypatch.setattr(slots, "SLOT", 4096)
    memory = Slots(workers=1, ahead=0)
    packed = memory.pack(0, made(1))
    assert len(packed.data) > 3 * 8000
    assert_equal(memory.unpack(packed), made(1))


class Rows(Dataset):
    def __getitem__(self, position):
        return torch.full((5_000,), position)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_consumer_that_keeps_what_it_was_given_keeps_it_unchanged(workers):
    stream = batches(
        Rows(), batch_size=4, micro_batch=4, rank=0, world=1, start=0, workers=workers,
        collate=torch.stack,
    )  # fmt: skip
    kept = [next(stream) for _ in range(40)]
    for i, batch in enumerate(kept):
        wanted = torch.arange(4 * i, 4 * i + 4)
        assert torch.equal(batch, wanted[:, None].expand(4, 5_000))
