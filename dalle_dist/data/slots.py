"""Memory through which loader processes hand their micro-batches over; it has no name.

torch's own way leaves a segment in /dev/shm when a process is killed at the wrong moment. This
memory is mapped before the processes are forked, and goes with the last of them.
"""

from __future__ import annotations

import io
import mmap
import pickle
from typing import Any

import numpy as np
import torch
from torch import Tensor

SLOT = 256 << 20  # bytes, taken from the machine only as far as they are used
ALIGNED = 64
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's, where Python does not name it


class Slots:
    """For each loader process a ring of slots, which it fills one after another.

    Args:
        ahead: micro-batches that a process may be ahead of what was unpacked.
    """

    def __init__(self, workers: int, ahead: int) -> None:
        self._ring = ahead + 1
        self._filled = 0  # by this process
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NORESERVE
        self._memory = mmap.mmap(-1, max(workers, 1) * self._ring * SLOT, flags=flags)

    def pack(self, worker: int, batch: Any) -> Packed:
        """The batch, its tensors in the next slot; in the pickle itself if they are too large."""
        buffers: list[pickle.PickleBuffer] = []
        data = _dumps(batch, buffers)
        sizes = [len(buffer.raw()) for buffer in buffers]
        if sum(map(_padded, sizes)) > SLOT:
            return Packed(_dumps(batch, None), 0, [])
        start = place = (worker * self._ring + self._filled % self._ring) * SLOT
        self._filled += 1
        for buffer, size in zip(buffers, sizes, strict=True):
            self._memory[place : place + size] = buffer.raw()
            place += _padded(size)
        return Packed(data, start, sizes)

    def unpack(self, packed: Packed) -> Any:
        """The batch, copied out of its slot, which may be filled again then."""
        buffers, place = list[bytearray](), packed.start
        with memoryview(self._memory) as memory:
            for size in packed.sizes:
                buffers.append(bytearray(memory[place : place + size]))
                place += _padded(size)
        # What a process forked from this one has packed; never a file.
        return pickle.loads(packed.data, buffers=buffers)


class Packed:
    """What goes through the pipe: a pickle, and where the slot has what it leaves out."""

    __slots__ = ("data", "sizes", "start")

    def __init__(self, data: bytes, start: int, sizes: list[int]) -> None:
        self.data, self.start, self.sizes = data, start, sizes


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


def _padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
