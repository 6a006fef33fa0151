"""The micro-batches of a rank, made by loader processes from any data set.

What a loader process finds amiss, and its errors, travel with the micro-batches, whose tensors go
through memory without a name (`slots.py`): a kill leaves nothing behind.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import signal
import struct
import traceback
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection
from typing import Any, Protocol, TypeVar

from torch.utils.data import DataLoader, Dataset, get_worker_info

from dalle_dist.data.notes import Notes
from dalle_dist.data.slots import Packed, Slots
from dalle_dist.errors import ConfigError, DataError, UserError

AHEAD = 2  # micro-batches that each loader process makes before they are asked for
ENDING = 5.0  # seconds within which a loader process that has closed its pipe is gone
NOW_READ = struct.Struct("qq")  # a loader process and the position that it reads
T_co = TypeVar("T_co", covariant=True)


class Samples(Sized, Iterable[T_co], Protocol[T_co]):
    """Those of a micro-batch, each read when it is asked for; once."""


Collate = Callable[[Samples[Any]], Any]


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    micro_batch: int,
    rank: int,
    world: int,
    start: int,
    workers: int,
    collate: Collate,
    notes: Notes | None = None,
    pin_memory: bool = False,
) -> MicroBatches:
    """This rank's micro-batches, from sample `start` of the endless stream on, without end.

    A batch is the next `batch_size` positions. Its micro-batch a over all ranks is the a-th run of
    world * micro_batch of them, of which rank r takes every `world`-th from the r-th on: those of
    the streams that it owns. The union over ranks is the same for any number of ranks or workers.

    Args:
        collate: makes a micro-batch of its samples.
        notes: what the data set notes on its samples is added here as they come.

    Raises:
        ConfigError: batch_size is not a multiple of world * micro_batch.
        DataError: a sample cannot be read, or a loader process ended; the sample is named.
    """
    if batch_size % (world * micro_batch):
        raise ConfigError(
            f"batch size {batch_size} is not a multiple of {world} ranks x micro-batch "
            f"{micro_batch} = {world * micro_batch}"
        )
    # Batches follow one another without a gap, and so do the runs inside them.
    sampler = _Positions(start, micro_batch, rank, world)
    return MicroBatches(
        dataset, sampler, workers, collate, Notes() if notes is None else notes, pin_memory
    )


class _Positions:
    def __init__(self, start: int, micro_batch: int, rank: int, world: int) -> None:
        self.start, self.micro_batch, self.rank, self.world = start, micro_batch, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        stretch = self.world * self.micro_batch
        first = self.start + self.rank
        while True:
            yield list(range(first, first + stretch, self.world))
            first += stretch


@dataclass
class _Loaded:
    """A micro-batch, packed if it comes from another process, or why there is none."""

    batch: Any = None
    notes: Notes = field(default_factory=Notes)
    error: str = ""


class _Reading:
    """The samples at some positions, each read when it is asked for."""

    def __init__(self, dataset: Any, positions: list[int], now: Callable[[int], None]) -> None:
        self._dataset, self._positions, self._now = dataset, positions, now
        self.position = positions[0]  # read last

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[Any]:
        for position in self._positions:
            self.position = position
            self._now(position)
            yield self._dataset[position]


class _ByPositions(Dataset):
    """Whole micro-batches of a data set, by their positions."""

    def __init__(self, dataset: Any, collate: Collate, now: mmap.mmap, slots: Slots) -> None:
        self.dataset, self.collate, self._now, self._slots = dataset, collate, now, slots

    def __getitems__(self, positions: list[int]) -> _Loaded:
        worker, process = get_worker_info(), os.getpid()
        place = worker.id * NOW_READ.size if worker is not None else 0
        reading = _Reading(
            self.dataset, positions, partial(NOW_READ.pack_into, self._now, place, process)
        )
        make = partial(self.collate, reading)
        try:
            batch = make() if worker is None else self._slots.pack(worker.id, make)
        except UserError as error:
            return _Loaded(error=str(error))
        except Exception as error:
            if worker is None:
                raise
            traceback.print_exc()
            return _Loaded(error=f"{described(self.dataset, reading.position)}: {error!r}")
        notes = getattr(self.dataset, "notes", None)
        return _Loaded(batch, notes.take() if notes is not None else Notes())


class MicroBatches:
    """Iterator of a rank's micro-batches."""

    def __init__(
        self,
        dataset: Dataset,
        sampler: _Positions,
        workers: int,
        collate: Collate,
        notes: Notes,
        pin_memory: bool,
    ) -> None:
        # Anonymous: it ends with the processes, however they end.
        self._now = mmap.mmap(-1, max(workers, 1) * NOW_READ.size)
        self._dataset, self._notes = dataset, notes
        self._slots, self._pin_memory = Slots(workers, AHEAD), pin_memory
        loader = DataLoader(
            _ByPositions(dataset, collate, self._now, self._slots),
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_rank,
            persistent_workers=workers > 0,
            prefetch_factor=AHEAD if workers else None,
        )
        self._loader = _started(loader) if workers else iter(loader)

    def __iter__(self) -> MicroBatches:
        return self

    def __next__(self) -> Any:
        try:
            loaded: _Loaded = next(self._loader)
        except (RuntimeError, ConnectionError, EOFError) as error:
            raise self.failure(error) or error from None
        if loaded.error:
            raise DataError(loaded.error)
        self._notes.add(loaded.notes)
        packed = isinstance(loaded.batch, Packed)
        batch = self._slots.unpack(loaded.batch) if packed else loaded.batch
        return pinned(batch) if self._pin_memory else batch

    def failure(self, error: Exception) -> DataError | None:
        """What to raise for an error of torch's, which may come at any time, of a loader's end."""
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            return None
        ended = self._ended()
        for process, position in NOW_READ.iter_unpack(self._now[:]):
            if process in ended:
                return DataError(
                    f"{described(self._dataset, position)}: the loader process that read it ended "
                    f"({_first_line(error)}); if memory ran out, take fewer data.workers"
                )
        return DataError(f"a loader process ended ({_first_line(error)})")

    def _ended(self) -> set[int]:
        """The loader processes that are no more; what tells of an end may come before it."""
        known = {process for process, _ in NOW_READ.iter_unpack(self._now[:])}
        alive = {child.sentinel: child for child in multiprocessing.active_children()}
        if known <= {child.pid for child in alive.values()}:
            ended = connection.wait(list(alive), timeout=ENDING)
            return known & {alive[sentinel].pid for sentinel in ended}  # type: ignore[index]
        return known - {child.pid for child in alive.values()}


def pinned(batch: Any) -> Any:
    """The same in memory that a GPU copies from without waiting."""
    from torch.utils.data._utils.pin_memory import pin_memory

    return pin_memory(batch)


def described(dataset: Any, position: int) -> str:
    """A sample of a data set in words."""
    describe = getattr(dataset, "describe", None)
    return f"sample {position}" if describe is None else str(describe(position))


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _leave_signals_to_the_rank(_worker: int) -> None:
    """A scheduler's signal goes to all processes of a rank; the run goes on until it has saved.

    The second SIGTERM is the rank's own, to a loader process that does not end by itself.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def heed_the_next(number: int, _frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, heed_the_next)


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator, its workers forked so that they never collect what they inherited.

    A process group that is garbage, or becomes it, waits in its destructor for threads that a
    forked process does not have: the worker would hang, and the run with it.
    """
    gc.collect()
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()
