"""Random access to the samples of a folder of shards; nothing is scanned."""

from __future__ import annotations

import contextlib
import os
import resource
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dalle_dist import storage
from dalle_dist.data.shards.index import ShardIndex, ShardInfo
from dalle_dist.data.shards.side_file import SideFile, read_column, side_beside
from dalle_dist.errors import DataError

OPEN_SHARDS = 2_048  # of a process, where the system grants it as many open files
HEADER = 512  # bytes of a tar header, before each member
NAME = 100  # bytes of the name in it; longer ones stand elsewhere
EVICTED = 8  # times that a shard is fetched anew because its copy went before it was opened
TOGETHER = 4_096  # bytes between the files of a sample that are rather read than sought over


class DamagedShard(DataError):
    """A shard that is missing or damaged, also after it was fetched again; its number."""

    def __init__(self, message: str, shard: int = -1) -> None:
        super().__init__(message)
        self.shard = shard


class ShardSet:
    """Random access to the samples of a folder of shards, by their position in the index.

    A shard's size and sha256 are compared with the index when a process first opens it.

    Args:
        kind: "images" or "tokens"; None: whatever they hold.

    Raises:
        DataError: no such shards, or another kind of them.
        DamagedShard: one is missing, truncated, damaged, or not what the index says.
    """

    def __init__(self, folder: str, kind: str | None = None) -> None:
        self.folder, self.index = folder, ShardIndex.load(folder)
        if kind not in (self.index.kind, None):
            raise DataError(f"{folder}: holds shards of {self.index.kind}, wanted {kind}")
        self.sizes = self.index.shards.samples
        self._ends = np.cumsum(self.sizes)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __len__(self) -> int:
        return self.index.samples

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # open files stay with their process

    @property
    def remote(self) -> bool:
        """Whether the tars are: an index may lie elsewhere."""
        return storage.is_remote(_path(self.folder, self.index.shards[0].name))

    def place(self, i: int) -> tuple[int, int]:
        """(shard, number in it) of sample `i`."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = int(np.searchsorted(self._ends, i, "right"))
        return shard, i - self.first(shard)

    def first(self, shard: int) -> int:
        """Of the samples, the first that lies in `shard`."""
        return int(self._ends[shard] - self.sizes[shard])

    def evenly(self, most: int) -> list[int]:
        """Shards that hold samples, evenly spread: `most` of them where there are more."""
        held = np.flatnonzero(self.sizes)
        count = min(len(held), most)
        return [int(held[i * len(held) // count]) for i in range(count)]

    def read(self, i: int) -> dict[str, bytes]:
        """Sample `i`: contents by extension, and its key under "__key__"."""
        return self.read_at(*self.place(i))

    def read_at(self, shard: int, number: int) -> dict[str, bytes]:
        """As `read`, of a sample by its place."""
        return self._shard(shard).read(number)

    def key(self, i: int) -> str:
        shard, number = self.place(i)
        return self._shard(shard).side.key(number)

    def captions(self, shard: int) -> list[str]:
        """Those of a shard's samples, from its side file alone."""
        return self.column(shard, "caption")

    def column(self, shard: int, name: str) -> list[Any]:
        """A column of a shard's side file (`side_file.py`)."""
        for _ in range(EVICTED):
            with contextlib.suppress(FileNotFoundError):
                return list(read_column(self._side(shard), name))
        raise self._gone(shard)

    def fetch(self, shard: int) -> None:
        """Bring a remote shard into the cache, ahead of its use."""
        self._side(shard)
        self._tar(shard)

    def require_files(self) -> None:
        """Raise DataError unless every shard of a local folder is there, of its size."""
        if storage.is_remote(self.folder):
            return
        for info in self.index.shards:
            sizes = {info.name: info.bytes, side_beside(info.name): info.side_bytes}
            for name, size in sizes.items():
                path = _path(self.folder, name)
                if storage.is_remote(path):
                    continue
                found = Path(path).stat().st_size if Path(path).is_file() else None
                if found != size:
                    what = "no such file" if found is None else f"{found} bytes"
                    raise DataError(
                        f"{path}: {what}, the index says {size} bytes; fetch or build the shard "
                        "again"
                    )

    def verified(self, shard: int) -> Iterator[dict[str, bytes]]:
        """All samples of a shard, which is compared with the index byte for byte and name by name.

        Raises:
            DamagedShard: it is not as it should be.
        """
        with contextlib.closing(self._opened(shard)) as opened:
            yield from map(opened.read, range(len(opened.side)))

    def verify_all(self) -> None:
        """Raises DamagedShard for the first shard that is not as it should be."""
        for shard in range(len(self.sizes)):
            for _ in self.verified(shard):
                pass

    def _shard(self, shard: int) -> _OpenShard:
        found = self._open.get(shard)
        if found is not None:
            self._open.move_to_end(shard)
            return found
        found = self._open[shard] = self._opened(shard)
        if len(self._open) > _most_open():
            self._open.popitem(last=False)[1].close()
        return found

    def _opened(self, shard: int) -> _OpenShard:
        info = self.index.shards[shard]
        for _ in range(EVICTED):
            # Each is opened as soon as it is there: a full cache may delete the copy.
            with contextlib.suppress(FileNotFoundError):
                side = SideFile(self._side(shard), side_beside(info.name))
                return _OpenShard(shard, self._tar(shard), side, info)
        raise self._gone(shard)

    def _gone(self, shard: int) -> DamagedShard:
        name = self.index.shards[shard].name
        return DamagedShard(f"{name}: is deleted from the cache again and again", shard)

    def _tar(self, shard: int) -> Path:
        info = self.index.shards[shard]
        return self._fetch(shard, info.name, info.bytes, info.sha256)

    def _side(self, shard: int) -> Path:
        info = self.index.shards[shard]
        return self._fetch(shard, side_beside(info.name), info.side_bytes, info.side_sha256)

    def _fetch(self, shard: int, name: str, size: int, sha256: str) -> Path:
        path = _path(self.folder, name)
        try:
            return storage.fetch(path, size, sha256)
        except DataError as error:
            raise DamagedShard(str(error), shard) from None
        except OSError as error:
            raise DamagedShard(f"{path}: {error.strerror}", shard) from None


def _path(folder: str, name: str) -> str:
    """Of a shard: beside its index, or wherever the index says."""
    return name if "://" in name or name.startswith("/") else storage.join(folder, name)


def _most_open() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * OPEN_SHARDS and soft < hard:
        soft = 2 * OPEN_SHARDS if hard == resource.RLIM_INFINITY else min(hard, 2 * OPEN_SHARDS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(OPEN_SHARDS, soft // 2)


class _OpenShard:
    """One tar, its file open. Raises DamagedShard, or FileNotFoundError: it has just gone."""

    def __init__(self, number: int, tar: Path, side: SideFile, info: ShardInfo) -> None:
        self._number, self._name, self.side = number, info.name, side
        if len(self.side) != info.samples:
            raise self._lies(f"{len(self.side)} samples, the index says {info.samples}")
        self._extents = list(self.side.extents.items())
        try:
            self._file = os.open(tar, os.O_RDONLY)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DamagedShard(f"{tar}: {error.strerror}", number) from None

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        file, self._file = getattr(self, "_file", -1), -1
        if file >= 0:
            os.close(file)

    def read(self, sample: int) -> dict[str, bytes]:
        key = self.side.key(sample)
        places = [
            (extension, offset, size)
            for extension, (offsets, sizes) in self._extents
            if (offset := offsets.item(sample)) >= 0 and (size := sizes.item(sample)) >= 0
        ]
        places.sort(key=lambda place: place[1])
        files = {"__key__": key.encode()}
        first = places[0][1] if places else HEADER
        block, begin, end = b"", 0, 0
        for i, (extension, offset, size) in enumerate(places):
            if offset + size > end:
                begin, end = offset - HEADER, offset + size
                for _, next_offset, next_size in places[i + 1 :]:
                    if next_offset - end > TOGETHER:
                        break
                    end = next_offset + next_size
                block = self._read(begin, end)
            files[extension] = block[offset - begin : offset - begin + size]
            if len(files[extension]) != size:
                raise self._lies(f"ends within sample {key}")
            if offset == first and not _named(block[:NAME], f"{key}.{extension}"):
                raise self._lies(f"sample {key} is not where the side file says")
        return files

    def _read(self, begin: int, end: int) -> bytes:
        try:
            return os.pread(self._file, end - begin, begin)
        except OSError as error:  # of a disk, or of a file system of the network
            raise DamagedShard(f"{self._name}: {error.strerror}", self._number) from None

    def _lies(self, what: str) -> DamagedShard:
        advice = "'dalle-dist data index' makes its index anew"
        return DamagedShard(f"{self._name}: {what}; {advice}", self._number)


def _named(field: bytes, name: str) -> bool:
    """Whether a header's name is this one; a long or unusual name stands in a header of its own."""
    if len(name) >= NAME or not name.isascii():
        return True
    # Others' tars have "./" before their names, and extensions in upper case.
    found, wanted = field.rstrip(b"\0").removeprefix(b"./"), name.removeprefix("./").encode()
    return found == wanted or found.lower() == wanted.lower()
