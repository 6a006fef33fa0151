"""`dalle-dist data index`: tars that were made elsewhere become a set where they lie.

Each tar is scanned once, by itself (`tar_scan.py`), and gets a side file; no image is copied.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dalle_dist import storage
from dalle_dist.data.build.keys import share
from dalle_dist.data.pool import make_units
from dalle_dist.data.shard_job import PLAN, UNFINISHED, Job, Note, Record
from dalle_dist.data.shards import INDEX, PARTS, ShardInfo, parts_of
from dalle_dist.data.shards.side_file import SUFFIX, side_beside
from dalle_dist.data.tar_scan import TarScan
from dalle_dist.errors import DataError
from dalle_dist.storage.local import sha256_of

EARLIER = "earlier.json"  # an index that is made anew, until the new one is there
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True)
class Options:
    """How tars are indexed.

    Attributes:
        kind: "images" or "tokens"; None: as an earlier index says, else images.
        held_out: share of the tars that are held out, at least one; with an output alone.
        seed: of which ones.
        processes: None: as many as there are cores.
    """

    kind: str | None = None
    held_out: float = 0.05
    seed: int = 0
    processes: int | None = None

    def check(self) -> None:
        """Raises DataError: senseless numbers."""
        if not 0 < self.held_out < 1:
            raise DataError(f"--held-out {self.held_out:g}: between 0 and 1")
        if self.processes is not None and self.processes < 1:
            raise DataError(f"--processes {self.processes}: at least 1")


@dataclass(frozen=True)
class TarUnit:
    """A tar: `tar` is its path or URL, `listed` its name in the index."""

    part: str
    listed: str
    tar: str

    @property
    def name(self) -> str:
        return side_beside(self.listed).removesuffix(SUFFIX)


class IndexJob(Job):
    """Its units are tars that are there already; it makes their side files."""

    REMEDY = f"delete {UNFINISHED}/ in it, or repeat that command"

    def _write(self, unit: TarUnit, note: Note) -> ShardInfo | None:
        try:
            path, scan = storage.fetch(unit.tar), TarScan(self.kind)
            scan.read(path)
            size, sha256 = path.stat().st_size, sha256_of(path)
        except OSError as error:
            raise DataError(f"{unit.tar}: {error.strerror}") from None
        note.update(
            counts=dict(scan.counts), examples=scan.examples, damage=scan.damage, first=scan.first
        )
        if not len(scan.rows):
            return None
        with tempfile.TemporaryDirectory(prefix="dalle-dist-") as folder:
            side = Path(folder) / "side"
            scan.rows.write(side)
            data, side_sha256 = side.read_bytes(), sha256_of(side)
        storage.write_bytes(storage.join(self._part(unit.part), side_beside(unit.listed)), data)
        return ShardInfo(unit.listed, size, sha256, len(scan.rows), len(data), side_sha256)

    def _files(self, shard: ShardInfo) -> Sequence[str]:
        return (side_beside(shard.name),)  # never the tar: it is its owner's


def index_tars(source: str, out: str | None, options: Options) -> None:
    """Make the tars of `source` a set: in `out`/train and `out`/held-out, or in `source` itself.

    An index that lies in `source` is made anew; its kind and meta stay.

    Raises:
        DataError: no tars, none with a sample that can be used, or a folder that is in use or
            cannot be written to.
    """
    options.check()
    if out is not None:
        meta = {"source": Path(source).name}
        units = _shared_out(source, _tars(source), options)
        _run(IndexJob(out, options.kind or "images", meta, units, _plan(units), PARTS), options)
        return
    for folder in parts_of(source):
        _index_in_place(folder, options)


def _index_in_place(folder: str, options: Options) -> None:
    tars = _tars(folder)
    earlier = _set_aside(folder)
    tree = json.loads(earlier) if earlier else {}
    kind = options.kind or str(tree.get("kind", "images"))
    meta = dict(tree.get("meta", {"source": Path(folder).name}))
    units = [TarUnit("", name, storage.join(folder, name)) for name in tars]
    try:
        _run(IndexJob(folder, kind, meta, units, _plan(units)), options)
    except DataError:
        # Of another job the folder keeps all it has; this one has removed what it made.
        if earlier and not storage.exists(storage.join(folder, UNFINISHED, PLAN)):
            storage.write_bytes(storage.join(folder, INDEX), earlier)
        raise


def _set_aside(folder: str) -> bytes | None:
    """The index that is made anew, or has been by a job that was cut off; it no longer counts."""
    index, aside = storage.join(folder, INDEX), storage.join(folder, UNFINISHED, EARLIER)
    begun = storage.exists(storage.join(folder, UNFINISHED, PLAN))
    if not begun and storage.exists(index):
        _require_index(index)
        storage.write_bytes(aside, storage.read_bytes(index))
        storage.remove(index)
    found = next((path for path in (aside, index) if storage.exists(path)), None)
    return storage.read_bytes(found) if found else None


def _require_index(path: str) -> None:
    try:
        tree = json.loads(storage.read_bytes(path))
        good = isinstance(tree["meta"], dict) and "kind" in tree
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise DataError(f"{path}: not an index of shards; delete it if it is of no use")


def _tars(source: str) -> list[str]:
    """Their names in `source`, in order. Raises DataError: there is none."""
    names = storage.list_files(source)
    tars = [name for name in names if name.lower().endswith(".tar") and not _hidden(name)]
    compressed = [name for name in names if name.lower().endswith(COMPRESSED)]
    advice = "'dalle-dist data build' reads pictures in folders, tables and compressed tars"
    if not tars:
        raise DataError(f"{source}: no such folder, or no .tar in it; {advice}")
    if compressed:
        print(f"left out: {len(compressed)} compressed tars, e.g. {compressed[0]}; {advice}")
    return tars


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _shared_out(source: str, tars: list[str], options: Options) -> list[TarUnit]:
    """Whole tars are held out: those of the lowest shares."""
    if len(tars) < 2:
        raise DataError(
            f"{source}: one tar, of which none can be held out; 'dalle-dist data build' splits it"
        )
    root = source if storage.is_remote(source) else str(Path(storage.normal(source)).absolute())
    count = min(max(1, round(options.held_out * len(tars))), len(tars) - 1)
    held = set(sorted(tars, key=lambda tar: share(tar, options.seed))[:count])
    paths = {tar: storage.join(root, tar) for tar in tars}
    return [TarUnit(PARTS[tar in held], path, path) for tar, path in paths.items()]


def _plan(units: list[TarUnit]) -> Any:
    return [unit.listed for unit in units]


def _run(job: IndexJob, options: Options) -> None:
    job.open()
    missing = job.missing()
    processes = options.processes or len(os.sched_getaffinity(0))
    try:
        bar = tqdm(total=len(missing), desc="index", unit="tar", disable=not missing)
        with bar:
            for _ in make_units(job, missing, processes):
                bar.update()
    except KeyboardInterrupt:
        print(f"{job.folder}: scanned tars are kept; the same command goes on", file=sys.stderr)
        raise
    job.finish(lambda records: _report(job, records))


def _report(job: IndexJob, records: list[Record]) -> None:
    """Print it. Raises DataError: a part has no samples."""
    counts, examples, used = Counter[str](), dict[str, str](), dict.fromkeys(job.parts, 0)
    for unit, record in zip(job.units, records, strict=True):
        assert isinstance(unit, TarUnit)
        note, samples = record.note, record.shard.samples if record.shard else 0
        used[unit.part] += samples
        counts.update(note["counts"])
        for reason, name in note["examples"].items():
            examples.setdefault(reason, f"{unit.tar}: {name}")
        if note["damage"]:
            print(f"damaged {unit.tar}: {note['damage']}; {samples} samples before that are used")
    reasons = [f"{count:>9}  {name}, e.g. {examples[name]}" for name, count in counts.most_common()]
    if not all(used.values()):
        why = "; ".join(" ".join(reason.split()) for reason in reasons)
        part = next(part for part, count in used.items() if not count)
        where = f"the tars of {part}" if part and any(used.values()) else "the tars"
        raise DataError(f"{job.folder}: no samples of {job.kind} in {where}{why and f': {why}'}")
    print(*reasons, sep="\n", end="\n" * bool(reasons))
    firsts = [record.note["first"] for record in records if record.shard]
    if len(set(firsts)) < len(firsts):
        print(
            "keys are counted anew in each tar, which 'data verify' will tell of; 'data build'"
            " makes them unique"
        )
    for part, count in used.items():
        print(f"{storage.join(job.folder, part) if part else job.folder}: {count} {job.kind}")
