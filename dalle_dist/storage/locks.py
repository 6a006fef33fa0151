"""Locks that the processes of a node share, by files; where there are none, nobody waits."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_NONE_HERE = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds `path`, which is made, against other processes and threads.

    A file system without locks gives none: then an object may be fetched twice, which is no error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        take(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Closing is not enough: a process forked meanwhile has the same open file.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def take(descriptor: int, operation: int) -> bool:
    """Whether the lock was had; `operation` as `fcntl.flock`'s. Without locks: as if it was."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NONE_HERE:
            raise
    return True


def held_by_nobody(path: Path, age: float) -> bool:
    """Whether a lock file of at least `age` seconds is free, so that its owner ended."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        old = time.time() - os.fstat(descriptor).st_mtime > age
        return old and take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
