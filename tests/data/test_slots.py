"""Micro-batches through memory without a name."""

import os
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


def pack(memory, batch, worker=0):
    return memory.pack(worker, lambda: batch)


def test_a_batch_lies_in_a_slot_of_its_own_until_it_is_gone():
    memory = Slots(workers=1, ahead=1)
    found = []
    for i in range(3):
        packed = pack(memory, made(i))
        assert len(packed.data) < 600, "tensors are not in the pickle"
        found.append(memory.unpack(packed))
    last = pack(memory, made(3))
    assert len(last.data) > 3 * 8000, "no slot is free"
    assert_equal(memory.unpack(last), made(3))
    row = found[1].rows[2]
    del found[1]
    assert len(pack(memory, made(4)).data) > 3 * 8000, "a view of the batch is still there"
    assert torch.equal(row, made(1).rows[2])
    del row
    again = pack(memory, made(5))
    assert len(again.data) < 600
    assert_equal(memory.unpack(again), made(5))
    for i, batch in zip((0, 2), found, strict=True):
        assert_equal(batch, made(i))


def test_what_a_consumer_writes_into_its_batch_is_in_no_other():
    memory = Slots(workers=1, ahead=1)
    first, second = memory.unpack(pack(memory, made(1))), memory.unpack(pack(memory, made(2)))
    first.rows.fill_(7)
    assert_equal(second, made(2))


def test_a_forked_process_does_not_give_its_parents_slots_back():
    memory = Slots(workers=1, ahead=0)
    held = [memory.unpack(pack(memory, made(i))) for i in range(2)]
    child = os.fork()
    if not child:
        # Nothing else: what other tests have left may wait for threads that are not forked.
        held.clear()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    pack(memory, made(9))
    for i, batch in enumerate(held):
        assert_equal(batch, made(i))


def test_memory_for_a_part_of_a_batch_lies_in_its_slot():
    memory, parts = Slots(workers=1, ahead=0), []

    def make():
        parts.append(slots.empty((4, 5), torch.int16))
        parts.append(slots.empty((3, 7), torch.uint8))
        parts[0].copy_(torch.arange(20).view(4, 5))
        parts[1].fill_(9)
        return parts[1].t(), torch.ones(5), parts[0]

    ones, _, numbers = memory.unpack(memory.pack(0, make))
    assert ones.tolist() == [[9] * 3] * 7 and numbers.flatten().tolist() == [*range(20)]
    parts[0][3, 4], parts[1][0, 6] = 77, 5
    assert numbers[3, 4] == 77 and ones[6, 0] == 5, "nothing was copied"
    outside = slots.empty((4, 5), torch.int16)
    assert outside.shape == (4, 5) and outside.dtype == torch.int16


def test_a_batch_that_could_not_be_made_takes_no_slot():
    memory = Slots(workers=1, ahead=0)

    def fail():
        slots.empty((4, 5), torch.int16)
        raise ValueError("no such colour")

    for _ in range(5):
        with pytest.raises(ValueError, match="no such colour"):
            memory.pack(0, fail)
    assert len(pack(memory, made(1)).data) < 600


def test_tensors_keep_their_layout_and_go_by_the_slot():
    memory = Slots(workers=1, ahead=0)
    rows = torch.arange(2 * 3 * 40 * 50).view(2, 40, 50, 3)
    for tensor in (rows.permute(0, 3, 1, 2), rows, rows[0, 0, 0, 0], rows.permute(3, 2, 1, 0)):
        packed = pack(memory, tensor)
        found = memory.unpack(packed)
        assert torch.equal(found, tensor) and found.stride() == tensor.stride()
        assert len(packed.data) < 400
    part = rows[:, ::2]
    assert torch.equal(memory.unpack(pack(memory, part)), part)


def test_processes_have_slots_of_their_own():
    memory = Slots(workers=2, ahead=0)
    ours, theirs = pack(memory, made(1), 0), pack(memory, made(2), 1)
    assert_equal(memory.unpack(ours), made(1))
    assert_equal(memory.unpack(theirs), made(2))


def test_what_does_not_fit_goes_with_the_pickle(monkeypatch):
    monkeypatch.setattr(slots, "SLOT", 4096)
    memory = Slots(workers=1, ahead=0)
    for size in (1000, 170):  # neither part fits; each does, but not both

        def make(size=size):
            return made(1, size), slots.empty((9, size), torch.uint8).fill_(3)

        packed = memory.pack(0, make)
        assert len(packed.data) > 33 * size
        batch, more = memory.unpack(packed)
        assert_equal(batch, made(1, size))
        assert more.tolist() == [[3] * size] * 9


class Rows(Dataset):
    def __getitem__(self, position):
        return torch.full((5_000,), position)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_consumer_that_keeps_what_it_was_given_keeps_it_unchanged(workers):
    stream = batches(
        Rows(), batch_size=4, micro_batch=4, rank=0, world=1, start=0, workers=workers,
        collate=lambda rows: torch.stack([*rows]),
    )  # fmt: skip
    kept = [next(stream) for _ in range(40)]
    for i, batch in enumerate(kept):
        wanted = torch.arange(4 * i, 4 * i + 4)
        assert torch.equal(batch, wanted[:, None].expand(4, 5_000))
