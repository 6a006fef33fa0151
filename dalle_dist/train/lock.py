"""Only one process trains in a run, wherever it lies.

A folder is locked by the file system, which lets go when the process ends. A remote run, and a
folder of a file system without locks, are held by a lease (`storage/lease.py`).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dalle_dist import storage
from dalle_dist.errors import UserError
from dalle_dist.storage.conditional import Cell, FileCell, StoredCell
from dalle_dist.storage.lease import LIFETIME, Lease
from dalle_dist.storage.store import NoConditions

LOCK, LEASE = ".lock", ".lease"
WITHOUT = "DALLE_DIST_NO_LOCK"
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class NoLocks(Exception):
    """The file system has none."""


class Lock:
    """A run's, held from now until `release`.

    Args:
        folder: of the run, or the working copy of a remote one; folders on the way are made.
        run: the run's path, local or remote.
        say: takes one line, if others are waited for.
        lease_seconds: after which a process that does not answer is replaced, where there are no
            locks that the kernel opens.

    Raises:
        UserError: another process holds it, the store does not keep two apart, or it cannot be
            written.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        say: Callable[[str], None] = print,
        lease_seconds: float = LIFETIME,
    ) -> None:
        self._folder, self._run = folder, run
        self._say, self._seconds = say, lease_seconds
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._file: FileLock | None = None
        self._lease: Lease | None = None
        try:
            self._file = self._locked()
            if storage.is_remote(run):
                self._lease = self._leased(StoredCell(storage.join(storage.normal(run), LEASE)))
            elif self._file is None and os.environ.get(WITHOUT) != "1":
                self._lease = self._leased(FileCell(folder / LEASE))
        except BaseException:
            self.release(used=False)
            raise

    @property
    def lost(self) -> bool:
        """Whether this process knows that another has taken the run over."""
        return self._lease is not None and self._lease.lost

    def fence(self) -> None:
        """Return when this process alone may write to the run. Raises `Lease.fence`'s."""
        if self._lease is not None:
            self._lease.fence()

    def release(self, used: bool) -> None:
        """Let others in; an unused folder goes, as far as it was not there before."""
        if self._lease is not None:
            self._lease.release(used)
        if self._file is not None:
            self._file.release(used)
        if not used:
            for folder in self._made:
                with suppress(OSError):  # not empty, or not made
                    folder.rmdir()

    def _locked(self) -> FileLock | None:
        try:
            return FileLock(self._folder / LOCK, self._run)
        except NoLocks:
            return None

    def _leased(self, cell: Cell) -> Lease | None:
        try:
            return Lease(cell, self._run, self._say, self._seconds)
        except NoConditions as error:
            if os.environ.get(WITHOUT) == "1":
                return None
            raise UserError(
                f"{error}, so a second process could not be kept out; train into another store or "
                f"a folder, or set {WITHOUT}=1 and see to it yourself"
            ) from None


class FileLock:
    """A lock of the file system, held until `release`, or the end of the process.

    Raises:
        UserError: another process holds it, or it cannot be written.
        NoLocks: and no file is left.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w")
        except OSError as error:
            raise storage.not_written(path.parent, error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            if error.errno in _TAKEN:
                raise _another(run) from None
            path.unlink(missing_ok=True)
            raise NoLocks from None
        if not self._is_the_one():  # its last holder has removed it between our two calls
            self._file.close()
            raise _another(run)

    def _is_the_one(self) -> bool:
        try:
            return self._path.stat().st_ino == os.fstat(self._file.fileno()).st_ino
        except FileNotFoundError:
            return False

    def release(self, used: bool) -> None:
        """An unused file goes."""
        if not used:
            self._path.unlink(missing_ok=True)
        self._file.close()


def _another(run: str) -> UserError:
    return UserError(f"{run}: another process is training in this folder")
