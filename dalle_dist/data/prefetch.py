"""Shards of a remote data set come into the cache before they are needed."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from typing import Any

from torch.utils.data import get_worker_info

from dalle_dist.data.order import SampleOrder
from dalle_dist.data.shards import ShardSet
from dalle_dist.errors import DataError

THREADS = 4  # of each loader process


class ShardPrefetch:
    """While a stream reads one window of shards, the shards of its next one are fetched.

    The loader processes of a rank share out the shards. What cannot be fetched here is reported
    by whoever reads it.
    """

    def __init__(self, shards: ShardSet, order: SampleOrder) -> None:
        self._shards, self._order = shards, order
        self._reading: dict[int, tuple[int, int]] = {}
        self._wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._process = 0  # in which the threads run

    def __getstate__(self) -> dict[str, Any]:
        return {"_shards": self._shards, "_order": self._order}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_shards"], state["_order"])  # type: ignore[misc]

    def reading(self, position: int) -> None:
        """Sample `position` is about to be read."""
        stream = position % self._order.streams
        begin, end = self._reading.get(stream, (0, 0))
        if begin <= position < end:
            return
        window = self._order.window(position)
        known = position == end  # the one before was read to its end, and this one fetched
        self._reading[stream] = (position, window.end)
        for ahead in (window.number + 1,) if known else (window.number, window.number + 1):
            for shard in self._order.shards_of(window.epoch, stream, ahead):
                self._want(shard)

    def _want(self, shard: int) -> None:
        worker = get_worker_info()
        if worker is not None and shard % worker.num_workers != worker.id:
            return
        if self._process != os.getpid():  # threads do not survive a fork
            self._process, self._wanted = os.getpid(), queue.SimpleQueue()
            for _ in range(THREADS):
                # They must not keep a process that ends.
                threading.Thread(target=self._fetch, daemon=True).start()
        self._wanted.put(shard)

    def _fetch(self) -> None:
        wanted = self._wanted
        while True:
            with contextlib.suppress(DataError):
                self._shards.fetch(wanted.get())
