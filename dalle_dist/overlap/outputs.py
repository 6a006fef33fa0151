"""The table of nearest images, and the keys of those that do not overlap."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from dalle_dist import storage
from dalle_dist.overlap.found import Found
from dalle_dist.overlap.images import Label

TABLE, KEEP = "overlap.csv", "keep.txt"
DIGITS = 5  # of a similarity
COLUMNS = ("key", "caption", "nearest_key", "nearest_caption", "similarity")
Labels = dict[int, Label]  # of images by their number


@dataclass(frozen=True)
class Pair:
    """An evaluated image and the training image nearest to it, by their numbers; the cosine."""

    evaluated: int
    nearest: int
    similarity: float


def pairs_of(found: Found) -> list[Pair]:
    """The most similar first; of equally similar ones that which comes first in its set."""
    columns = found.evaluated_Q, found.nearest.numbers_Q, found.nearest.similarities_Q
    rows = zip(*(column.tolist() for column in columns), strict=True)
    pairs = [Pair(number, nearest, round(value, DIGITS)) for number, nearest, value in rows]
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.evaluated))


def overlapping(pairs: Sequence[Pair], threshold: float) -> int:
    """How many pairs are at least that similar: of pairs in their order, the first ones."""
    return sum(pair.similarity >= threshold for pair in pairs)


def write_table(out: str, pairs: Sequence[Pair], evaluated: Labels, training: Labels) -> None:
    """overlap.csv: a row for each pair, the most similar first."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for pair in pairs:
        similarity = f"{pair.similarity:.{DIGITS}f}"
        table.writerow([*evaluated[pair.evaluated], *training[pair.nearest], similarity])
    storage.write_bytes(storage.join(out, TABLE), text.getvalue().encode())


def write_keep(out: str, pairs: Sequence[Pair], threshold: float, evaluated: Labels) -> None:
    """keep.txt: a line for each evaluated image that does not overlap, its key, in their order."""
    kept = sorted(pair.evaluated for pair in pairs[overlapping(pairs, threshold) :])
    lines = "".join(f"{evaluated[number].key}\n" for number in kept)
    storage.write_bytes(storage.join(out, KEEP), lines.encode())
