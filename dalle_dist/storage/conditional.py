"""One object or file that several processes change: a write counts only if none came between.

`StoredCell` leaves the decision to a remote store. `FileCell` needs of a file system only that of
all who create one name, one succeeds: for those without locks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from dalle_dist.errors import DataError
from dalle_dist.paths import normal
from dalle_dist.storage import local, retry
from dalle_dist.storage.store import Conflict, NoConditions, store_of

_KEPT = 2  # generations of a file: a writer shows by the last but one that it knew the last
_NO_VERSION = f'"{"0" * 32}"'  # an ETag that no object has
_FILLING = 1.0  # seconds in which a file that was just created has its content


class Versioned(NamedTuple):
    """What a cell holds; of two contents the versions differ."""

    data: bytes
    version: str


class Cell(Protocol):
    """Raises DataError: the store does not answer, or the disk does not take it."""

    def read(self) -> Versioned | None:
        """None when there is nothing."""

    def write(self, data: bytes, version: str | None) -> str:
        """Replace that version, or with None create; the version that is there then.

        `data` must differ from all that was ever written. Raises Conflict: another was quicker.
        """

    def remove(self, version: str) -> None:
        """Leave nothing, if it is still this version. Raises Conflict."""

    def require_conditions(self, data: bytes) -> None:
        """To be called when something is there, with what `write` may get.

        Raises NoConditions: the store writes whether or not the condition holds.
        """


class StoredCell:
    """A `Cell` that is an object of a remote store.

    Args:
        path: of the object.
        before: called before each attempt to write; what it raises ends the write.

    Raises:
        NoConditions: the store says that it has no conditional writes. Others do not say it:
            `require_conditions`.
    """

    def __init__(self, path: str, before: Callable[[], None] = lambda: None) -> None:
        self._path, self._before = normal(path), before
        self._store = store_of(self._path)

    def version(self) -> str | None:
        """Of the object that is there now; None when there is none."""
        stat = retry.call(lambda: self._store.stat(self._path))
        return None if stat is None else stat.version

    def read(self) -> Versioned | None:
        def attempt() -> Versioned | None:
            stat = self._store.stat(self._path)
            if stat is None:
                return None
            part = self._store.read(self._path, 0, stat.size, stat.version)
            return Versioned(part.data, stat.version)

        return retry.call(attempt)

    def write(self, data: bytes, version: str | None) -> str:
        def attempt() -> str:
            self._before()
            return self._store.put_if(self._path, data, version)

        try:
            written = retry.call(attempt)
        except Conflict:
            # An earlier attempt may have succeeded whose answer was lost.
            found = self.read()
            if found is None or found.data != data:
                raise
            written = found.version
        if not written:
            raise NoConditions(f"{self._path}: the store gives objects no ETag")
        if written.strip('"') != hashlib.md5(data, usedforsecurity=False).hexdigest():
            self._compare(data)
        return written

    def _compare(self, data: bytes) -> None:
        found = self.read()
        if found is None or found.data != data:
            raise DataError(f"{self._path}: the store keeps other bytes than were written")

    def remove(self, version: str) -> None:
        retry.call(lambda: self._store.delete_if(self._path, version))

    def require_conditions(self, data: bytes) -> None:
        for version in (None, _NO_VERSION):
            try:
                retry.call(lambda: self._store.put_if(self._path, data, version))  # noqa: B023
            except Conflict:
                continue
            retry.call(lambda: self._store.delete(self._path))
            raise NoConditions(f"{self._path}: the store ignores the conditions of writes")


class FileCell:
    """A `Cell` that is a folder: its files 1, 2, 3 ... are what it held, the highest what it holds.

    Only one process can create the next file. Who was away too long finds that the file it knew as
    the last is gone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self) -> Versioned | None:
        deadline = time.monotonic() + _FILLING
        while True:
            numbers = self._numbers()
            if not numbers:
                return None
            with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
                data = (self._folder / str(numbers[-1])).read_bytes()
                if data or time.monotonic() > deadline:
                    return Versioned(data, str(numbers[-1]))
            time.sleep(0.01)

    def write(self, data: bytes, version: str | None) -> str:
        known = int(version or 0)
        file = self._folder / str(known + 1)
        try:
            if version is None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._require_last(known)
            with file.open("xb") as opened:
                opened.write(data)
                opened.flush()
                os.fsync(opened.fileno())
        except FileExistsError:
            raise Conflict(str(self._folder)) from None
        except OSError as error:
            raise local.not_written(file, error) from None
        self._confirm(known)
        for number in self._numbers()[:-_KEPT]:
            (self._folder / str(number)).unlink(missing_ok=True)
        return str(known + 1)

    def remove(self, version: str) -> None:
        self._require_last(int(version))
        for number in self._numbers():
            (self._folder / str(number)).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another has just come
            self._folder.rmdir()

    def require_conditions(self, data: bytes) -> None:
        """Every file system creates a name once."""

    def _confirm(self, known: int) -> None:
        """After the next file was created: were others further already?"""
        try:
            self._require_last(known + 1)
            if known and known not in self._numbers():
                raise Conflict(str(self._folder))
        except Conflict:
            (self._folder / str(known + 1)).unlink(missing_ok=True)
            raise

    def _require_last(self, number: int) -> None:
        if (self._numbers() or [0])[-1] != number:
            raise Conflict(str(self._folder))

    def _numbers(self) -> list[int]:
        try:
            # A change of our own, without which a network file system may list what it remembers.
            descriptor, name = tempfile.mkstemp(dir=self._folder, prefix=local.TEMPORARY)
            os.close(descriptor)
            Path(name).unlink()
            return sorted(int(p.name) for p in self._folder.iterdir() if p.name.isdigit())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise local.not_written(self._folder, error) from None
