"""Tar shards with an index: `key.png key.txt key.json`, or `key.npy key.txt key.json` for tokens.

The tar files are img2dataset's layout and readable by anything that reads WebDataset. Beside them
lies `index.json`, written last, with the size, sha256 and sample count of each.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import shutil
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import webdataset

from dalle_dist import storage
from dalle_dist.data.order import SampleOrder
from dalle_dist.errors import DataError

INDEX = "index.json"
OPEN_SHARDS = 64
Members = dict[str, tuple[int, int]]  # extension -> (offset, bytes)


@dataclass(frozen=True)
class ShardInfo:
    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class ShardIndex:
    """What lies in a folder of shards. `kind` is "images" or "tokens"."""

    kind: str
    meta: dict[str, Any]
    shards: list[ShardInfo]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def order(self, seed: int, shuffle_shards: int) -> SampleOrder:
        """In which to train on the samples."""
        return SampleOrder(seed, [shard.samples for shard in self.shards], shuffle_shards)

    @classmethod
    def load(cls, folder: str) -> ShardIndex:
        """Raises DataError: no index, not an index, or no samples in it."""
        path = storage.join(folder, INDEX)
        if not storage.exists(path):
            raise DataError(f"{folder}: no shards here ({INDEX} is missing)")
        try:
            tree = json.loads(storage.read_bytes(path))
            index = cls(tree["kind"], tree["meta"], [ShardInfo(**s) for s in tree["shards"]])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: not an index of shards; build them again") from None
        if not index.samples:
            raise DataError(f"{folder}: the index lists no samples; build the shards again")
        return index


def refuse_used(*folders: str) -> None:
    """Raises DataError when one of the folders holds shards."""
    for folder in folders:
        if storage.exists(storage.join(folder, INDEX)):
            raise DataError(f"{folder}: in use, holds shards already; delete it or choose another")


class ShardWriter:
    """Context manager: writes samples into `folder`, local or remote, and the index at its end.

    When writing fails, what was written so far is removed again.

    Raises:
        DataError: the folder holds shards already or cannot be made, nothing was written, or the
            disk is full.
    """

    def __init__(
        self, folder: str, kind: str, meta: dict[str, Any], samples_per_shard: int = 1000
    ) -> None:
        refuse_used(folder)
        self.folder, self.kind, self.meta = folder, kind, meta
        self.samples_per_shard = samples_per_shard
        self._shards: list[ShardInfo] = []
        self._tar: Any = None
        self._count = 0

    def __enter__(self) -> ShardWriter:
        if storage.is_remote(self.folder):
            self._staging = Path(tempfile.mkdtemp(prefix="dalle-dist-"))
        else:
            # On the same disk as the folder, so that a finished shard is only renamed.
            self._staging = Path(storage.normal(self.folder)) / ".partial"
            try:
                self._staging.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise storage.not_written(self.folder, error) from None
        return self

    def write(self, key: str, files: dict[str, bytes]) -> None:
        """One sample: `files` maps extensions to contents. `key` has no dot and no slash."""
        try:
            self._add({"__key__": key, **files})
        except OSError as error:
            raise storage.not_written(self._path, error) from None
        if self._count == self.samples_per_shard:
            self._close_shard()

    def _add(self, sample: dict[str, Any]) -> None:
        if self._tar is None:
            self._path = self._staging / f"{len(self._shards):05d}.tar"
            self._tar = _tar_writer(self._path)
        self._tar.write(sample)
        self._count += 1

    def __exit__(
        self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None
    ) -> None:
        whole = False
        try:
            if kind is None:
                self._finish()
                whole = True
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            if not whole:
                self._remove_all()

    def _finish(self) -> None:
        if self._tar is not None:
            self._close_shard()
        self._write_index()

    def _remove_all(self) -> None:
        if self._tar is not None:
            with contextlib.suppress(OSError):
                self._tar.close()
        for shard in self._shards:
            storage.remove(storage.join(self.folder, shard.name))
        storage.remove_empty(self.folder)

    def _close_shard(self) -> None:
        try:
            self._tar.close()
        except OSError as error:
            raise storage.not_written(self._path, error) from None
        self._tar = None
        self._shards.append(_publish(self._path, self.folder, self._count))
        self._count = 0

    def _write_index(self) -> None:
        if not self._shards:
            raise DataError(f"{self.folder}: there was no sample to write")
        write_index(self.folder, self.kind, self.meta, self._shards)


def write_shard(
    folder: str, name: str, samples: Iterable[tuple[str, dict[str, bytes]]]
) -> ShardInfo:
    """One whole shard, in place of an earlier one of that name; (key, files) as `ShardWriter`'s.

    For processes that write shards of one folder together; `write_index` comes last.

    Raises:
        DataError: the disk is full, or the folder cannot be written to.
    """
    # Beside the folder's own shards, so that the finished one is only renamed.
    inside = None if storage.is_remote(folder) else storage.made(folder)
    staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=inside))
    try:
        count, path = 0, staging / name
        with _tar_writer(path) as tar:
            for key, files in samples:
                tar.write({"__key__": key, **files})
                count += 1
        return _publish(path, folder, count)
    except OSError as error:
        raise storage.not_written(storage.join(folder, name), error) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_index(folder: str, kind: str, meta: dict[str, Any], shards: Sequence[ShardInfo]) -> None:
    """What makes shards count; arguments as the fields of `ShardIndex`."""
    tree = {"kind": kind, "meta": meta, "shards": [asdict(shard) for shard in shards]}
    path = storage.join(folder, INDEX)
    storage.write_bytes(path, json.dumps(tree, indent=1).encode() + b"\n")


def _tar_writer(path: Path) -> Any:
    # Without names and times a shard's bytes depend on its samples only. The path is absolute:
    # webdataset takes what stands before the colon of data:v1/x for a scheme.
    return webdataset.TarWriter(str(path.absolute()), mtime=0, user="root", group="root")


def _publish(path: Path, folder: str, samples: int) -> ShardInfo:
    info = ShardInfo(path.name, path.stat().st_size, _sha256(path), samples)
    storage.publish(path, storage.join(folder, info.name))
    return info


class ShardSet:
    """Random access to the samples of a folder of shards, by their position in the index.

    Raises:
        DataError: no such shards, another kind of them, or one missing, truncated or damaged.
    """

    def __init__(self, folder: str, kind: str) -> None:
        self.folder, self.index = folder, ShardIndex.load(folder)
        if self.index.kind != kind:
            raise DataError(f"{folder}: holds shards of {self.index.kind}, wanted {kind}")
        self.sizes = [shard.samples for shard in self.index.shards]
        self._ends = list(itertools.accumulate(self.sizes))
        self._open: OrderedDict[int, list[tuple[str, Members]]] = OrderedDict()

    def __len__(self) -> int:
        return self.index.samples

    def read(self, i: int) -> dict[str, bytes]:
        """Sample `i`: contents by extension, and its key under "__key__"."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = bisect.bisect_right(self._ends, i)
        key, members = self._shard(shard)[i - self._ends[shard]]
        sample = {"__key__": key.encode()}
        # Asked for each time: the cache may have deleted a copy, or learns that it is in use.
        with self._file(self.index.shards[shard]).open("rb") as file:
            for extension, (offset, size) in members.items():
                file.seek(offset)
                sample[extension] = file.read(size)
        return sample

    def require_files(self) -> None:
        """Raise DataError unless every shard of a local folder is there, of its size."""
        if not storage.is_remote(self.folder):
            for info in self.index.shards:
                self._file(info)

    def verify(self) -> None:
        """Compare every shard with its sha256. Raises DataError naming the first that differs."""
        for info in self.index.shards:
            path = self._file(info)
            if _sha256(path) != info.sha256:
                raise DataError(
                    f"{storage.join(self.folder, info.name)}: sha256 differs from the index; "
                    "fetch or build the shard again"
                )

    def _shard(self, number: int) -> list[tuple[str, Members]]:
        if number not in self._open:
            info = self.index.shards[number]
            path = self._file(info)
            samples = _scan(path, storage.join(self.folder, info.name))
            if len(samples) != info.samples:
                raise DataError(
                    f"{storage.join(self.folder, info.name)}: {len(samples)} samples, the index "
                    f"says {info.samples}; fetch or build the shard again"
                )
            self._open[number] = samples
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _file(self, info: ShardInfo) -> Path:
        # Local shards are hashed by `verify` alone: each process would read all of them once more.
        sha256 = info.sha256 if storage.is_remote(self.folder) else None
        return storage.fetch(storage.join(self.folder, info.name), info.bytes, sha256)


def _scan(path: Path, name: str) -> list[tuple[str, Members]]:
    samples: dict[str, Members] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise DataError(f"{name}: not a whole tar file ({error})") from None
    return list(samples.items())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
