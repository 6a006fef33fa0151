"""The captions that a tokenizer is trained on: all of a set or a sample, from side files alone."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

import numpy as np

from dalle_dist.data.shards import ShardSet
from dalle_dist.data.shards.index import RANDOM_LINE
from dalle_dist.data.source import caption_lines

SHARDS = 1_000  # a sample comes from so many shards, or from more where they hold too few captions


class CaptionSample:
    """At most `most` captions of a set, spread evenly over its shards; one shard's in memory.

    Which ones depends on (seed, set) alone. All lines of a sample that has several count. Shards
    that give nothing are not fetched, and of those that do only the side files.

    Raises:
        DamagedShard: on the way, a side file is missing or damaged.
    """

    def __init__(self, shards: ShardSet, most: int, seed: int) -> None:
        self._shards, self._most, self._seed = shards, most, seed
        self._several = shards.index.meta.get("captions") == RANDOM_LINE
        self._chosen = self._spread()

    @functools.cached_property
    def count(self) -> int:
        """Captions that are taken."""
        return min(self._most, sum(self._sizes))

    def __iter__(self) -> Iterator[str]:
        found = sum(self._sizes)
        end = 0
        for shard, size in zip(self._chosen, self._sizes, strict=True):
            begin, end = end, end + size
            taken = end * self.count // found - begin * self.count // found
            if taken:
                captions = self._captions(shard)
                numbers = random.Random(f"{self._seed} captions {shard}").sample(range(size), taken)
                yield from (captions[number] for number in sorted(numbers))

    def __str__(self) -> str:
        total = sum(self._sizes)
        of, shards = f"{total:,} captions", len(self._shards.sizes)
        if len(self._chosen) < shards:
            total = round(total * len(self._shards) / int(self._shards.sizes[self._chosen].sum()))
            about = "about " * self._several
            of = f"{about}{total:,} captions, from {len(self._chosen):,} of {shards:,} shards"
        return f"{self.count:,} of {of}"

    def _spread(self) -> list[int]:
        """Shards that hold enough captions: of each of so many equal runs of them, one."""
        shards = np.flatnonzero(self._shards.sizes)
        needed = -(-self._most * len(shards) // len(self._shards))
        if (count := max(needed, SHARDS)) >= len(shards):
            return [int(shard) for shard in shards]
        generator = random.Random(f"{self._seed} shards of captions")
        runs = np.array_split(shards, count)
        return [int(generator.choice(run)) for run in runs]

    @functools.cached_property
    def _sizes(self) -> list[int]:
        """Captions of each chosen shard: the index knows them unless a sample has several."""
        if self._several:
            return [len(self._captions(shard)) for shard in self._chosen]
        return [int(self._shards.sizes[shard]) for shard in self._chosen]

    def _captions(self, shard: int) -> list[str]:
        captions = self._shards.captions(shard)
        if not self._several:
            return captions
        return [line for text in captions for line in caption_lines(text)]
