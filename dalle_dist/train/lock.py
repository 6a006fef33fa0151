"""Only one process trains in a folder: a lock of the file system, gone with its process."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from dalle_dist.errors import UserError
from dalle_dist.storage import not_written

WITHOUT = "DALLE_DIST_NO_LOCK"
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class Lock:
    """Held from now until `release`, or the end of the process.

    Args:
        path: the lock's file; folders on the way are made.
        run: what the errors call the locked folder.

    Raises:
        UserError: another process holds it, the file system has no locks, or it cannot be written.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        self._made = [folder for folder in path.parents if not folder.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w")
        except OSError as error:
            self._remove_folders()
            raise not_written(path.parent, error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            taken = error.errno in _TAKEN
            if not taken and os.environ.get(WITHOUT) == "1":
                return
            self._file.close()
            if taken:
                raise UserError(f"{run}: another process is training in this folder") from None
            path.unlink(missing_ok=True)
            self._remove_folders()
            raise UserError(
                f"{run}: this file system keeps no locks (flock: {error.strerror}), so a second "
                "process could not be kept out; mount it with locks (Lustre: -o flock), choose "
                f"another folder, or set {WITHOUT}=1 and see to it yourself"
            ) from None
        if not self._is_the_one():  # its last holder has removed it between our two calls
            self._file.close()
            raise UserError(f"{run}: another process is training in this folder")

    def _is_the_one(self) -> bool:
        try:
            return self._path.stat().st_ino == os.fstat(self._file.fileno()).st_ino
        except FileNotFoundError:
            return False

    def release(self, used: bool) -> None:
        """Let others in; an unused folder goes, as far as it was not there before."""
        if not used:
            self._path.unlink(missing_ok=True)
        self._file.close()
        if not used:
            self._remove_folders()

    def _remove_folders(self) -> None:
        for folder in self._made:
            with suppress(OSError):  # not empty, or not made
                folder.rmdir()
