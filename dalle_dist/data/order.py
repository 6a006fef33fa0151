"""The order of samples: a function of (seed, epoch, position), whoever reads with how many."""

from __future__ import annotations

import hashlib

import numpy as np


class SampleOrder:
    """Each epoch visits every sample once: shards are permuted, then mixed in groups.

    Mixing within groups of `shuffle_shards` shards bounds how many a reader must have at hand.
    """

    def __init__(self, seed: int, shard_sizes: list[int], shuffle_shards: int) -> None:
        self.seed, self.shard_sizes, self.shuffle_shards = seed, shard_sizes, shuffle_shards
        self.samples = sum(shard_sizes)
        self._known: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample index) of a position in the endless stream of samples."""
        epoch, index = divmod(position, self.samples)
        if epoch != self._known[0]:
            self._known = (epoch, self._permutation(epoch))
        return epoch, int(self._known[1][index])

    def _permutation(self, epoch: int) -> np.ndarray:
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(digest, "big"))
        starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        shards = random.permutation(len(self.shard_sizes))
        groups = []
        for first in range(0, len(shards), self.shuffle_shards):
            group = shards[first : first + self.shuffle_shards]
            samples = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in group])
            groups.append(random.permutation(samples))
        return np.concatenate(groups)
