"""The merges of byte-pair encoding, with a dropout that can be seeded (Provilkov et al. 2020)."""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping, Sequence

Pair = tuple[int, int]


class Merges:
    """Which pairs of ids become which id, in which order.

    pairs  of each pair its rank, from 1, the lowest first, and the id of the two together
    """

    def __init__(self, pairs: Mapping[Pair, tuple[int, int]]) -> None:
        self._pairs = pairs

    def merge(self, ids: Sequence[int], dropout: float, generator: random.Random) -> list[int]:
        """A word's ids, merged: the lowest rank first among the pairs not dropped.

        The pairs wait in a heap. One that is dropped comes back after the next merge, so that it
        is dropped or not anew each time, as in the paper; n ids take about n log n steps.
        """
        pieces: list[int | None] = list(ids)
        after = list(range(1, len(pieces) + 1))  # of each piece, where the next one starts
        before = list(range(-1, len(pieces) - 1))
        waiting = [
            (rank, i) for i in range(len(pieces) - 1) if (rank := self._rank(pieces, i, i + 1))
        ]
        heapq.heapify(waiting)
        dropped: list[tuple[int, int]] = []
        while waiting:
            rank, i = heapq.heappop(waiting)
            right = after[i]
            if right == len(pieces) or self._rank(pieces, i, right) != rank:
                continue  # one of the two has merged with another piece since
            if dropout and generator.random() < dropout:
                dropped.append((rank, i))
                continue
            pieces[i], pieces[right] = self._pairs[pieces[i], pieces[right]][1], None  # type: ignore[index]
            after[i] = after[right]
            if after[i] < len(pieces):
                before[after[i]] = i
            for left, other in ((before[i], i), (i, after[i])):
                if left >= 0 and other < len(pieces) and (new := self._rank(pieces, left, other)):
                    heapq.heappush(waiting, (new, left))
            for pair in dropped:
                heapq.heappush(waiting, pair)
            dropped.clear()
        return [piece for piece in pieces if piece is not None]

    def _rank(self, pieces: list[int | None], left: int, right: int) -> int:
        """Of two pieces; 0: they do not merge."""
        return self._pairs.get((pieces[left], pieces[right]), (0, 0))[0]  # type: ignore[arg-type]
