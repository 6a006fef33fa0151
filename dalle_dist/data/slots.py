"""Memory through which loader processes hand their micro-batches over; it has no name.

torch's own way leaves a segment in /dev/shm when a process is killed at the wrong moment. This
memory is mapped before the processes are forked, and goes with the last of them.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import os
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

SLOT = 256 << 20  # bytes, taken from the machine only as far as they are used
ALIGNED = 64
IN_USE = 2  # micro-batches of a loader process that are mostly in use at a time
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's, where Python does not name it


class Slots:
    """For each loader process slots that it fills; one is free again when its batch is gone.

    Args:
        ahead: micro-batches that a process may be ahead of what was unpacked.
    """

    def __init__(self, workers: int, ahead: int) -> None:
        self._each = ahead + IN_USE
        count = max(workers, 1) * self._each
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NORESERVE
        self._memory = mmap.mmap(-1, count * SLOT, flags=flags)
        self._taken = mmap.mmap(-1, count)  # set by who fills a slot, unset by who unpacks it

    def pack(self, worker: int, make: Callable[[], Any]) -> Packed:
        """What `make` makes, its tensors in a slot; `empty` gives it memory that lies there.

        In the pickle itself if they are too large, or no slot is free.
        """
        slot = self._free(worker)
        if slot is None:
            return Packed(_dumps(make(), None), 0, [])
        room = _Room(self._memory, slot)
        with _filling(room):
            batch = make()
        buffers: list[pickle.PickleBuffer] = []
        data = _dumps(batch, buffers)
        places = [room.place(buffer) for buffer in buffers]
        if room.overflows:
            return Packed(_dumps(batch, None), 0, [])
        self._taken[slot] = bool(places)
        return Packed(data, slot, places)

    def unpack(self, packed: Packed) -> Any:
        """The batch; its tensors lie in the slot, which is taken until the last of them is gone."""
        if not packed.places:
            return pickle.loads(packed.data)
        slot = np.frombuffer(self._memory, np.uint8, SLOT, packed.slot * SLOT)
        weakref.finalize(slot, self._give_back, packed.slot, os.getpid()).atexit = False
        # What a process forked from this one has packed; never a file.
        return pickle.loads(packed.data, buffers=[slot[place] for place in packed.places])

    def _free(self, worker: int) -> int | None:
        slots = range(worker * self._each, (worker + 1) * self._each)
        return next((slot for slot in slots if not self._taken[slot]), None)

    def _give_back(self, slot: int, process: int) -> None:
        # A process that was forked while the batch was in use has an image of it that ends too.
        if os.getpid() == process:
            self._taken[slot] = False


class Packed:
    """What goes through the pipe: a pickle, and where the slot has what it leaves out."""

    __slots__ = ("data", "places", "slot")

    def __init__(self, data: bytes, slot: int, places: Sequence[slice]) -> None:
        self.data, self.slot, self.places = data, slot, places


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `torch.empty`; for a part of a batch that is being packed, in its slot: not to be kept."""
    found = None if _room is None else _room.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype) if found is None else found


class _Room:
    """A slot that is being filled."""

    def __init__(self, memory: mmap.mmap, slot: int) -> None:
        self._bytes, self._used = np.frombuffer(memory, np.uint8, SLOT, slot * SLOT), 0

    @property
    def overflows(self) -> bool:
        return self._used > SLOT

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        size = math.prod(shape) * dtype.itemsize
        if not size or self._used + size > SLOT:
            return None
        return torch.from_numpy(self._bytes[self._next(size)]).view(dtype).view(*shape)

    def place(self, buffer: pickle.PickleBuffer) -> slice:
        """Where the buffer is: where it lies already, or the place that it is copied to."""
        found = np.frombuffer(buffer.raw(), np.uint8)
        start = found.ctypes.data - self._bytes.ctypes.data
        if 0 <= start < SLOT:
            return slice(start, start + found.size)
        place = self._next(found.size)
        if not self.overflows:
            self._bytes[place] = found
        return place

    def _next(self, size: int) -> slice:
        start = self._used
        self._used = -(-(start + size) // ALIGNED) * ALIGNED
        return slice(start, start + size)


_room: _Room | None = None


@contextlib.contextmanager
def _filling(room: _Room) -> Iterator[None]:
    global _room
    _room = room
    try:
        yield
    finally:
        _room = None


class _Pickler(pickle.Pickler):
    """Tensors as arrays: torch's own reduction would put them into memory with a name."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        # Only an array whose numbers lie in its own order can be left out of the pickle.
        order = sorted(range(value.ndim), key=value.stride, reverse=True)
        dense = value.permute(order)
        if not dense.is_contiguous():
            order, dense = [*range(value.ndim)], value.contiguous()
        return _restored, (dense.numpy(), [order.index(i) for i in range(value.ndim)])


def _restored(dense: np.ndarray, order: list[int]) -> Tensor:
    return torch.from_numpy(dense).permute(order)


def _dumps(batch: Any, buffers: list[pickle.PickleBuffer] | None) -> bytes:
    file = io.BytesIO()
    keep = None if buffers is None else buffers.append
    _Pickler(file, protocol=5, buffer_callback=keep).dump(batch)
    return file.getvalue()
