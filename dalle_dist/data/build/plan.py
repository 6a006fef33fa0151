"""The units that the samples of a source are made in, and which of them are held out."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dalle_dist.data.build.folder import Skipped
from dalle_dist.data.build.keys import share
from dalle_dist.data.build.samples import Candidate, FilesUnit, Recipe, try_sample
from dalle_dist.data.shard_job import Unit

TRAIN, HELD_OUT = PARTS = ("train", "held-out")
TRIES = 100  # pictures looked at for one that can be held out, or trained on


@dataclass(frozen=True)
class Plan:
    """What a source comes to.

    Attributes:
        skipped: what is known to be of no use before any picture is read.
        captions: files that are captions of pictures.
        linked: folders that are links and were followed.
        samples: candidates, None where they are not counted yet.
        digest: JSON that differs between plans of other samples.
    """

    units: Sequence[Unit]
    digest: Any
    skipped: Skipped = field(default_factory=list)
    captions: int = 0
    linked: Sequence[str] = ()
    samples: int | None = None


def split_parts(
    candidates: Sequence[Candidate], recipe: Recipe, seed: int, held_out: float
) -> dict[str, list[Candidate]]:
    """The candidates of each part: those whose lot's share is at most `held_out` are held out.

    Of a set that may be small, one that can be used is held out, and one is trained on.
    """
    shares = {candidate.lot: share(candidate.lot, seed) for candidate in candidates}
    held = {lot for lot, number in shares.items() if number <= held_out}
    ordered = sorted(candidates, key=lambda candidate: shares[candidate.lot])
    lowest = _first_usable(ordered[:TRIES], recipe)
    highest = _first_usable(ordered[: -TRIES - 1 : -1], recipe)
    if lowest is not None and highest is not None and lowest != highest:
        held = (held | {lowest}) - {highest}
    parts: dict[str, list[Candidate]] = {part: [] for part in PARTS}
    for candidate in candidates:
        parts[HELD_OUT if candidate.lot in held else TRAIN].append(candidate)
    return parts


def _first_usable(candidates: Sequence[Candidate], recipe: Recipe) -> str | None:
    usable = (c.lot for c in candidates if not isinstance(try_sample(c, recipe), str))
    return next(usable, None)


def units_of(
    part: str, candidates: Sequence[Candidate], recipe: Recipe, samples_per_shard: int
) -> list[FilesUnit]:
    """A unit for each `samples_per_shard` candidates."""
    starts = range(0, len(candidates), samples_per_shard)
    pieces = [tuple(candidates[start : start + samples_per_shard]) for start in starts]
    return [FilesUnit(part, f"{i:05d}", piece, recipe) for i, piece in enumerate(pieces)]


def digest_of(units: Sequence[FilesUnit], recipe: Recipe) -> Any:
    """Which candidates each unit has, and what is made of them."""
    digest = hashlib.sha256()
    for unit in units:
        for candidate in unit.candidates:
            line = f"{unit.part} {unit.name} {candidate.identity}\0"
            digest.update(line.encode("utf-8", "surrogatepass"))
    return [digest.hexdigest(), dataclasses.asdict(recipe)]


def plan_of_parts(
    parts: dict[str, list[Candidate]], recipe: Recipe, samples_per_shard: int, **found: Any
) -> Plan:
    """Args: found: fields of `Plan`."""
    pieces = [units_of(part, parts[part], recipe, samples_per_shard) for part in PARTS]
    units = list(itertools.chain.from_iterable(pieces))
    count = sum(len(candidates) for candidates in parts.values())
    return Plan(units, digest_of(units, recipe), samples=count, **found)
