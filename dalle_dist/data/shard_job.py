"""Shards made by many processes, gone on with after any end: a job is a plan of units.

A unit makes one shard by itself, whose bytes depend on the plan alone. When it is finished it
leaves, beside the shard, a record under FOLDER/unfinished/: what the index says of the shard, and a
note of its own. Whoever finds the records of all units writes the indexes, and removes the records.
So a job may be killed at any time, and the same job started again makes what is missing.

`data build` has a unit for each thousand files, or tar, of each part, made in a pool (`pool.py`).
`encode` can have one for each image shard: each rank makes `job.missing(part=(rank, world))` on its
own device (`job.make(unit)`), and after a barrier one rank calls `finish`. Samples of a unit must
not depend on which others are made by the same process.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from dalle_dist import __version__, storage
from dalle_dist.data.shards import INDEX, ShardInfo, refuse_used, write_index, write_shard
from dalle_dist.data.shards.side_file import side_name
from dalle_dist.errors import DataError

UNFINISHED = "unfinished"
PLAN = "plan.json"
PARTIAL = (".partial-*", ".part-*")  # what writers that were killed leave
Sample = tuple[str, dict[str, bytes]]  # key, contents by extension
Note = dict[str, Any]  # JSON


class Unit(Protocol):
    """What makes one shard.

    Attributes:
        part: folder of the shard within the job's; "" for that folder itself.
        name: of the shard, NAME.tar.
    """

    @property
    def part(self) -> str: ...

    @property
    def name(self) -> str: ...


class SamplesUnit(Unit, Protocol):
    """A unit of a plain job."""

    def samples(self, note: Note) -> Iterator[Sample]:
        """The shard's samples; `note` is filled on the way and must be JSON when they end."""
        ...


@dataclass(frozen=True)
class Record:
    """Of a finished unit; `shard` is None where it had no sample."""

    shard: ShardInfo | None
    note: Note = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What is to be made; `index_tars.py` has a job of another kind of units.

    Attributes:
        folder: of the shards, or of their parts; local or remote.
        kind, meta: the fields of the indexes.
        units: in the order that their shards have in the index of their part.
        plan: anything in JSON that tells this job's shards from those of another.
        parts: those that the units name.
    """

    REMEDY: ClassVar[str] = "delete the folder, or repeat that command"

    folder: str
    kind: str
    meta: Mapping[str, Any]
    units: Sequence[Unit]
    plan: Any
    parts: Sequence[str] = ("",)

    def open(self) -> None:
        """Lay claim to the folder, or go on with this job there.

        Raises:
            DataError: it holds finished shards, or an unfinished job of another plan.
        """
        path = self._unfinished(PLAN)
        if not storage.exists(path):
            refuse_used(*(self._part(part) for part in self.parts))
            storage.write_bytes(path, json.dumps({"plan": self._digest()}).encode())
        elif json.loads(storage.read_bytes(path)) != {"plan": self._digest()}:
            raise DataError(
                f"{self.folder}: holds what an unfinished command with other inputs or options "
                f"left; {self.REMEDY}"
            )

    def missing(self, part: tuple[int, int] = (0, 1)) -> list[Unit]:
        """Units without a record, those of share `i` of `n` processes: part = (i, n)."""
        found = self._recorded()
        if self._finished():  # and killed while it removed the records
            return []
        own = itertools.islice(self.units, part[0], None, part[1])
        return [unit for unit in own if _record_name(unit) not in found]

    def make(self, unit: Unit) -> Record:
        """The unit's shard and its record. Raises DataError as `write_shard`."""
        note: Note = {}
        record = Record(self._write(unit, note), note)
        path = self._unfinished(_record_name(unit))
        storage.write_bytes(path, json.dumps(asdict(record)).encode())
        return record

    def _write(self, unit: Any, note: Note) -> ShardInfo | None:
        """The shard of a `SamplesUnit`; None where it has no sample."""
        samples = unit.samples(note)
        first = next(samples, None)
        if first is None:
            return None
        files = itertools.chain([first], samples)
        return write_shard(self._part(unit.part), f"{unit.name}.tar", files)

    def _files(self, shard: ShardInfo) -> Sequence[str]:
        """Names of what `_write` made of a unit, in the folder of its part."""
        return (shard.name, side_name(shard.name))

    def finish(self, conclude: Callable[[list[Record]], None] | None = None) -> bool:
        """Write the indexes once all units are done; False while records are missing.

        Args:
            conclude: is given the records, in the order of the units, before the indexes are there.
                When it raises a DataError, nothing is left in the folder but what is not ours.
        """
        if not self._finished():
            names = [_record_name(unit) for unit in self.units]
            if not set(names) <= self._recorded():
                return False
            try:
                self._conclude([self._read(name) for name in names], conclude)
            except FileNotFoundError:  # another process does the same, and is ahead
                return True
        self._clean()
        return True

    def _conclude(
        self, records: list[Record], conclude: Callable[[list[Record]], None] | None
    ) -> None:
        try:
            if conclude is not None:
                conclude(records)
        except DataError:
            self._remove_shards(records)
            raise
        for part in self.parts:
            write_index(self._part(part), self.kind, dict(self.meta), self._of(part, records))

    def _finished(self) -> bool:
        return all(storage.exists(storage.join(self._part(part), INDEX)) for part in self.parts)

    def _of(self, part: str, records: list[Record]) -> list[ShardInfo]:
        pairs = zip(self.units, records, strict=True)
        return [record.shard for unit, record in pairs if unit.part == part and record.shard]

    def _read(self, name: str) -> Record:
        path = self._unfinished(name)
        if not storage.exists(path):
            raise FileNotFoundError(path)
        tree = json.loads(storage.read_bytes(path))
        return Record(tree["shard"] and ShardInfo(**tree["shard"]), tree["note"])

    def _recorded(self) -> set[str]:
        return set(storage.list_files(self._unfinished()))

    def _remove_shards(self, records: list[Record]) -> None:
        for unit, record in zip(self.units, records, strict=True):
            if record.shard is not None:
                for name in self._files(record.shard):
                    storage.remove(storage.join(self._part(unit.part), name))
        self._clean()
        for part in self.parts:
            storage.remove_empty(self._part(part))
        storage.remove_empty(self.folder)

    def _clean(self) -> None:
        """Remove the records, the plan last, and what killed processes were writing."""
        for name in sorted(self._recorded(), key=lambda name: name == PLAN):
            storage.remove(self._unfinished(name))
        storage.remove_empty(self._unfinished())
        if storage.is_remote(self.folder):
            return  # what was being written lies on the machines that wrote it
        for part in {"", *self.parts}:
            _remove_partial(Path(self._part(part)))

    def _digest(self) -> str:
        units = [[unit.part, unit.name] for unit in self.units]
        tree = [__version__, self.kind, self.meta, units, self.plan]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def _part(self, part: str) -> str:
        return storage.join(self.folder, part) if part else self.folder

    def _unfinished(self, *names: str) -> str:
        return storage.join(self.folder, UNFINISHED, *names)


def share(text: str | None) -> tuple[int, int]:
    """What `--shard I/N` says, as (I - 1, N); None is all. Raises DataError: it says nothing."""
    if text is None:
        return 0, 1
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise DataError(f"--shard {text}: write I/N, e.g. 1/4, with I from 1 to N")
    return int(number) - 1, int(count)


def _record_name(unit: Unit) -> str:
    return f"{unit.part}-{unit.name}.json" if unit.part else f"{unit.name}.json"


def _remove_partial(folder: Path) -> None:
    for pattern in PARTIAL:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
