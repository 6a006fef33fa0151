"""The samples of a folder of shards by position, and what stands in for those that are damaged."""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch.utils.data import Dataset

from dalle_dist.data.notes import Notes
from dalle_dist.data.order import Place, SampleOrder
from dalle_dist.data.prefetch import ShardPrefetch
from dalle_dist.data.shards import DamagedShard, ShardSet
from dalle_dist.data.shards.index import RANDOM_LINE
from dalle_dist.errors import DataError


class SampleSource:
    """Reads samples; with an order, by position in the endless stream, else by index.

    A shard that stays bad is quarantined: the samples of the next one in the order stand in for
    its own. Which one that is depends on which shards are bad, not on who reads.

    Args:
        bad_shards: so many may be quarantined.

    Raises:
        DataError: as `ShardSet`.
    """

    def __init__(
        self, folder: str, kind: str, order: SampleOrder | None, bad_shards: int = 0
    ) -> None:
        self.folder, self.order, self.bad_shards = folder, order, bad_shards
        self.shards, self.notes = ShardSet(folder, kind), Notes()
        self._bad: set[int] = set()
        self._prefetch = None
        if order is not None and self.shards.remote:
            self._prefetch = ShardPrefetch(self.shards, order)

    def __len__(self) -> int:
        return len(self.shards)

    def place(self, position: int) -> Place:
        """Of a sample. Raises IndexError."""
        if self.order is None:
            return Place(0, *self.shards.place(position))
        return self.order.at(position)

    def describe(self, position: int) -> str:
        """A sample in words, for an error."""
        _, shard, number = self.place(position)
        key = self.shards.read_at(shard, number)["__key__"].decode()
        return f"{self.folder}: sample {key} of {self.shards.index.shards[shard].name}"

    def reading(self, position: int) -> Place:
        """As `place`, of a sample that is about to be read: what comes next is fetched ahead."""
        if self._prefetch is not None:
            self._prefetch.reading(position)
        return self.place(position)

    def read(self, place: Place) -> dict[str, bytes]:
        """A sample's contents, or those of what stands in for it where its shard is bad.

        Raises:
            DamagedShard: more shards are bad than may be.
        """
        shard, number = place.shard, place.number
        while True:
            if shard in self._bad:
                shard = self._after(shard)
                number %= int(self.shards.sizes[shard])
            try:
                return self.shards.read_at(shard, number)
            except DamagedShard as error:
                self._quarantine(shard, error)

    def others(self, place: Place) -> Iterator[Place]:
        """The samples that may stand in for one, the nearest first: each but this one, once."""
        epoch, shard, number = place
        sizes = self.shards.sizes
        for step in range(1, int(sizes[shard])):
            yield Place(epoch, shard, (number + step) % int(sizes[shard]))
        for other in (*range(shard + 1, len(sizes)), *range(shard)):
            for at in range(int(sizes[other])):
                yield Place(epoch, other, at)

    def caption(self, text: str, seed: str) -> str:
        """A sample's caption: of several, one to a line, that which `seed` chooses."""
        if self.shards.index.meta.get("captions") != RANDOM_LINE:
            return text
        return random.Random(f"line {seed}").choice(caption_lines(text) or [""])

    def index(self, place: Place) -> int:
        """Of a sample, its number among all of them."""
        return self.shards.first(place.shard) + place.number

    def _after(self, shard: int) -> int:
        if self.order is not None:
            return self.order.after(shard, self._bad)
        others = (*range(shard + 1, len(self.shards.sizes)), *range(shard))
        good = (other for other in others if other not in self._bad and self.shards.sizes[other])
        return next(good, shard)

    def _quarantine(self, shard: int, error: DamagedShard) -> None:
        name = self.shards.index.shards[shard].name
        if shard in self._bad or len(self._bad) == len(self.shards.sizes) - 1:
            raise DataError(f"{self.folder}: no shard of it can be read; the last: {error}")
        self._bad.add(shard)
        self.notes.quarantined[name] = str(error)
        require_few(len(self._bad), self.bad_shards, str(error))


class SourceDataset(Dataset):
    """What data sets of shards have in common; `__getitem__` is theirs."""

    source: SampleSource

    @property
    def shards(self) -> ShardSet:
        return self.source.shards

    @property
    def notes(self) -> Notes:
        """On what this process has read."""
        return self.source.notes

    def __len__(self) -> int:
        return len(self.source)

    def describe(self, position: int) -> str:
        """A sample in words, for an error."""
        return self.source.describe(position)


def caption_lines(text: str) -> list[str]:
    """The captions of a sample that has several."""
    return [line for line in text.splitlines() if line.strip()]


def require_few(bad: int, most: int, last: str) -> None:
    """Raise DamagedShard when more shards are bad than may be; `last` says what is wrong."""
    if bad > most:
        allowed = f" ({bad} shards are bad, data.bad_shards allows {most})" if most else ""
        raise DamagedShard(f"{last}{allowed}")
