"""The order of samples: a function of (seed, position) alone, whoever reads with how many.

The shards, in an order of their own, are shared out among canonical streams, the same share in
every epoch. Sample n of a run comes from stream n mod `streams`: a rank that takes every
`world`-th sample therefore reads the streams that it owns, and no others. Within its share a
stream shuffles the shards anew each epoch, and mixes samples within windows of a few shards.
Nothing here grows with the number of samples, only with that of shards.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dalle_dist.errors import ConfigError

MASK = 2**64 - 1
ODD = 0xD6E8FEB86659FD93  # a multiplier that spreads low bits over the high ones
ROUNDS = 6
TABLE = 64  # below that size a table is small, and the hash would be seen in it


class Place(NamedTuple):
    """Of a sample: the epoch, its shard in the index, its number in the shard."""

    epoch: int
    shard: int
    number: int


class Window(NamedTuple):
    """Shards of a stream whose samples are mixed: the window's number in its stream and epoch.

    end  a position; no sample of the stream from there on is in this window
    """

    epoch: int
    stream: int
    number: int
    end: int


class SampleOrder:
    """Each epoch visits every sample once.

    Args:
        sizes: samples of each shard.
        streams: canonical streams; any divisor of it is a number of ranks that can share them.
        shuffle_shards: shards of a stream whose samples are mixed with one another.
    """

    def __init__(
        self, seed: int, sizes: Sequence[int] | NDArray[np.int64], streams: int, shuffle_shards: int
    ) -> None:
        self.seed, self.streams, self.shuffle_shards = seed, streams, shuffle_shards
        self.sizes = np.asarray(sizes, np.int64)
        self.samples = int(self.sizes.sum())
        self._shards = _generator(seed, "shards").permutation(len(self.sizes))
        self._ends = np.cumsum(self.sizes[self._shards])
        self._rank = _reversed_digits(streams)
        self._begins: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        self._known: dict[int, _Share] = {}
        self._within: dict[int, KeyedPermutation] = {}

    def at(self, position: int) -> Place:
        """Where sample `position` of the endless stream of samples lies."""
        epoch, offset = divmod(position, self.samples)
        share = self._share(epoch, position % self.streams)
        shard, within = share.at(offset // self.streams)
        return Place(epoch, shard, self._mixed(shard).at(within))

    def window(self, position: int) -> Window:
        """The window of shards that sample `position` is in."""
        epoch, offset = divmod(position, self.samples)
        share = self._share(epoch, position % self.streams)
        number, end = share.window(offset // self.streams)
        left = end - offset // self.streams
        return Window(epoch, position % self.streams, number, position + left * self.streams)

    def shards_of(self, epoch: int, stream: int, window: int) -> list[int]:
        """Shards of a window; of the first one of the next epoch after the last."""
        share = self._share(epoch, stream)
        if window < share.windows:
            return share.shards(window)
        return _Share(self, epoch + 1, stream, self._range(epoch + 1, stream)).shards(0)

    def after(self, shard: int, passed: set[int]) -> int:
        """The shard that stands in for `shard`: the next in the order that is not in `passed`."""
        start = int(np.flatnonzero(self._shards == shard)[0])
        for step in range(1, len(self._shards)):
            found = int(self._shards[(start + step) % len(self._shards)])
            if found not in passed and self.sizes[found]:
                return found
        return shard

    def require(self, world: int) -> None:
        """Raise ConfigError unless `world` ranks can share the streams."""
        if self.streams % world:
            raise ConfigError(
                f"data.streams: {self.streams} streams cannot be shared by {world} ranks; take a "
                "multiple of every number of ranks that the run may have (it is part of the order "
                "of the samples)"
            )

    def _mixed(self, shard: int) -> KeyedPermutation:
        found = self._within.get(shard)
        if found is None:
            if len(self._within) > 4 * self.streams:
                self._within.clear()
            key = f"{self.seed} shard {shard}"
            found = self._within[shard] = KeyedPermutation(int(self.sizes[shard]), key)
        return found

    def _share(self, epoch: int, stream: int) -> _Share:
        found = self._known.get(stream)
        if found is None or found.epoch != epoch:
            found = _Share(self, epoch, stream, self._range(epoch, stream))
            self._known[stream] = found
        return found

    def _range(self, epoch: int, stream: int) -> tuple[int, int]:
        """What a stream has of the samples in the shards' own order: those from ... to before ...

        Where samples do not divide by streams, some have one more, which ones depends on where in
        the streams the epoch begins.
        """
        if self._begins[0] != epoch:
            each, left = divmod(self.samples, self.streams)
            streams = np.arange(self.streams)
            first = epoch * self.samples % self.streams
            counts = each + ((streams - first) % self.streams < left)
            in_order = np.empty_like(counts)
            in_order[self._rank] = counts
            self._begins = (epoch, np.concatenate([[0], np.cumsum(in_order)]))
        rank = self._rank[stream]
        return int(self._begins[1][rank]), int(self._begins[1][rank + 1])


class _Share:
    """One stream in one epoch: its pieces of shards, shuffled, in windows."""

    def __init__(
        self, order: SampleOrder, epoch: int, stream: int, range_: tuple[int, int]
    ) -> None:
        self.epoch, self._key = epoch, f"{order.seed} {epoch} {stream}"
        self._window, begin, end = order.shuffle_shards, *range_
        first, last = np.searchsorted(order._ends, [begin, max(begin, end - 1)], "right")
        pieces = np.arange(first, last + 1) if end > begin else np.empty(0, np.int64)
        starts = order._ends[pieces] - order.sizes[order._shards[pieces]]
        low = np.maximum(begin - starts, 0)
        high = np.minimum(end, order._ends[pieces]) - starts
        shuffled = _generator(self._key).permutation(len(pieces))
        self._shards = order._shards[pieces][shuffled]
        self._low = low[shuffled]
        self._ends = np.cumsum((high - low)[shuffled])
        self._ends_of_windows = self._ends[self._window - 1 :: self._window]
        if len(pieces) % self._window:
            self._ends_of_windows = np.append(self._ends_of_windows, self._ends[-1])
        self._mixed: tuple[int, int, KeyedPermutation] | None = None

    @property
    def windows(self) -> int:
        return len(self._ends_of_windows)

    def window(self, k: int) -> tuple[int, int]:
        """(number of the window, the first sample after it) of the stream's sample `k`."""
        window = int(self._ends_of_windows.searchsorted(k, "right"))
        return window, int(self._ends_of_windows[window])

    def shards(self, window: int) -> list[int]:
        return self._shards[window * self._window : (window + 1) * self._window].tolist()

    def at(self, k: int) -> tuple[int, int]:
        """(shard, position in it) of the stream's sample `k`."""
        begin, mixed = self._mixed_window(k)
        place = begin + mixed.at(k - begin)
        piece = int(self._ends.searchsorted(place, "right"))
        before = int(self._ends[piece - 1]) if piece else 0
        return int(self._shards[piece]), int(self._low[piece]) + place - before

    def _mixed_window(self, k: int) -> tuple[int, KeyedPermutation]:
        known = self._mixed
        if known is None or not known[0] <= k < known[1]:
            window, end = self.window(k)
            begin = int(self._ends_of_windows[window - 1]) if window else 0
            mixed = KeyedPermutation(end - begin, f"{self._key} {window}")
            known = self._mixed = (begin, end, mixed)
        return known[0], known[2]


class KeyedPermutation:
    """A permutation of `size` numbers; a large one without a table, as a Feistel network on a grid.

    Each round adds to one coordinate a hash of the other, which can be undone; what falls on the
    few cells beyond `size` goes through again.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self._rows = max(1, math.isqrt(max(size - 1, 0)) + 1)
        self._columns = max(1, -(-size // self._rows))
        self._table: list[int] = []
        if size <= TABLE:
            self._table = _generator(key).permutation(size).tolist()
        digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
        self._keys = [int.from_bytes(digest[i : i + 8], "big") for i in range(0, len(digest), 8)]

    def at(self, i: int) -> int:
        """Raises IndexError."""
        if not 0 <= i < self.size:
            raise IndexError(i)
        if self._table:
            return self._table[i]
        rows, columns, keys = self._rows, self._columns, self._keys
        while True:
            row, column = divmod(i, columns)
            for even, odd in zip(keys[::2], keys[1::2], strict=True):
                row = (row + (((column ^ even) * ODD & MASK) >> 24)) % rows
                column = (column + (((row ^ odd) * ODD & MASK) >> 24)) % columns
            i = row * columns + column
            if i < self.size:
                return i


def _generator(*key: object) -> np.random.Generator:
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _reversed_digits(count: int) -> NDArray[np.int64]:
    """Of each number below `count`, its digits read backwards, in the base of count's factors.

    Streams that are equal modulo a number of ranks, and so belong to one rank, thereby have
    shares that lie beside one another: of the shards only those at the ends are read by two ranks.
    """
    numbers, reversed_, place, left = np.arange(count), np.zeros(count, np.int64), count, count
    factor = 2
    while left > 1:
        while left % factor:
            factor += 1
        left //= factor
        place //= factor
        reversed_ += numbers % factor * place
        numbers //= factor
    return reversed_
