"""Writing of shards: tar and side file together, each whole before it has its name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from dalle_dist import storage
from dalle_dist.data.shards.index import ShardInfo, refuse_used, write_index
from dalle_dist.data.shards.side_file import Extents, SideRows, side_name
from dalle_dist.data.shards.tar_header import tar_header
from dalle_dist.errors import DataError
from dalle_dist.storage.local import sha256_of

AT_ONCE = 1 << 20  # bytes that are written together


class _ShardFile:
    """A tar that is being written, and its side file. Raises OSError wherever it writes."""

    def __init__(self, path: Path) -> None:
        self.path, self._rows = path, SideRows()
        self._file, self._bytes = path.open("wb"), 0
        self._digest = hashlib.sha256(usedforsecurity=False)
        self._blocks, self._waiting = list[bytes](), 0  # not written yet, and their bytes

    def add(self, key: str, files: dict[str, bytes]) -> None:
        extents: Extents = {}
        place = self._bytes
        for extension in sorted(files):
            data = files[extension]
            header, size = tar_header(f"{key}.{extension}", len(data)), len(data)
            padding = -size % tarfile.BLOCKSIZE
            self._blocks += (header, data, bytes(padding))
            extents[extension] = (place + len(header), size)
            place += len(header) + size + padding
        self._waiting += place - self._bytes
        self._bytes = place
        self._rows.add(key, files, extents)
        if self._waiting >= AT_ONCE:
            self._write()

    def _write(self) -> None:
        data = b"".join(self._blocks)
        self._blocks, self._waiting = [], 0
        self._digest.update(data)
        self._file.write(data)
        self._file.flush()
        _send_to_disk(self._file.fileno(), self._bytes - len(data), len(data))

    def __len__(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        self._file.close()

    def publish(self, folder: str) -> ShardInfo:
        """Close both files and move them to `folder`, the tar last."""
        end = 2 * tarfile.BLOCKSIZE
        end += -(self._bytes + end) % tarfile.RECORDSIZE
        self._blocks.append(bytes(end))
        self._bytes += end
        self._write()
        self.close()
        side = Path(side_name(str(self.path)))
        self._rows.write(side)
        info = ShardInfo(
            self.path.name,
            self._bytes,
            self._digest.hexdigest(),
            len(self),
            side.stat().st_size,
            sha256_of(side),
        )
        for path in (side, self.path):
            storage.publish(path, storage.join(folder, path.name))
        return info


def _send_to_disk(file: int, start: int, size: int) -> None:
    """Have the system begin to write a part of a file: there is less to wait for at its end."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file, start, size, os.POSIX_FADV_DONTNEED)


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
        self._file: _ShardFile | None = None

    def __enter__(self) -> ShardWriter:
        if storage.is_remote(self.folder):
            self._staging = Path(tempfile.mkdtemp(prefix="dalle-dist-"))
        else:
            # On the same disk as the folder, so that a finished shard is only renamed.
            self._staging = storage.made(self.folder) / ".partial"
            self._staging.mkdir(exist_ok=True)
        return self

    def write(self, key: str, files: dict[str, bytes]) -> None:
        """One sample: `files` maps extensions to contents. `key` has no dot and no slash."""
        path = self._staging / f"{len(self._shards):05d}.tar"
        try:
            if self._file is None:
                self._file = _ShardFile(path)
            self._file.add(key, files)
        except OSError as error:
            raise storage.not_written(path, error) from None
        if len(self._file) == self.samples_per_shard:
            self._close_shard(self._file)

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
        if self._file is not None:
            self._close_shard(self._file)
        if not self._shards:
            raise DataError(f"{self.folder}: there was no sample to write")
        write_index(self.folder, self.kind, self.meta, self._shards)

    def _remove_all(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        for shard in self._shards:
            for name in (shard.name, side_name(shard.name)):
                storage.remove(storage.join(self.folder, name))
        storage.remove_empty(self.folder)

    def _close_shard(self, file: _ShardFile) -> None:
        try:
            self._shards.append(file.publish(self.folder))
        except OSError as error:
            raise storage.not_written(file.path, error) from None
        self._file = None


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
        file = _ShardFile(staging / name)
        with contextlib.closing(file):
            for key, files in samples:
                file.add(key, files)
            return file.publish(folder)
    except OSError as error:
        raise storage.not_written(storage.join(folder, name), error) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
