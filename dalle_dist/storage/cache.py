"""Local copies of remote objects, shared by the processes of a node.

`objects/` holds the copies, `locks/` the files by which processes wait for one another. What is
used last is kept: `eviction.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from contextlib import AbstractContextManager
from pathlib import Path

from dalle_dist.errors import DataError
from dalle_dist.storage import eviction, local, retry
from dalle_dist.storage.locks import locked
from dalle_dist.storage.retry import PassingTrouble
from dalle_dist.storage.store import Store
from dalle_dist.storage.transfer import Download, Wanted

_FOLDER, _BUDGET = "DALLE_DIST_CACHE", "DALLE_DIST_CACHE_BYTES"
BUDGET = 100 * 10**9  # bytes
_NAME_BYTES = 100  # of an object's own name that its copy bears; file systems allow 255 in all
_checked: set[tuple[str, int, str]] = set()


def configure(folder: str | None = None, budget_bytes: int | None = None) -> None:
    """Where the cache lies and how large it may be, also for processes started from now on.

    None leaves a value as it is. It is kept in the environment, which every process inherits.
    """
    if folder is not None:
        os.environ[_FOLDER] = str(Path(folder).expanduser().absolute())
    if budget_bytes is not None:
        os.environ[_BUDGET] = str(budget_bytes)


def cache_folder() -> Path:
    """$DALLE_DIST_CACHE, else dalle-dist in $XDG_CACHE_HOME, else ~/.cache/dalle-dist."""
    if named := os.environ.get(_FOLDER):
        return Path(named).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "dalle-dist"


def budget() -> int:
    """Bytes that copies may take. Raises DataError when the environment gives no number."""
    text = os.environ.get(_BUDGET) or str(BUDGET)
    if not text.isdigit():
        raise DataError(f"{_BUDGET}={text}: not a number of bytes")
    return int(text)


def fetch(store: Store, path: str, size: int | None, sha256: str | None) -> Path:
    """The copy of an object; arguments as `storage.fetch`'s. Raises DataError."""
    download = Download(store, path)

    def attempt() -> Path:
        wanted = _wanted(store, path, size, sha256)
        copy = _place(path, wanted)
        if _usable(copy, wanted, compare=False):
            return copy
        # Compared by one thread, while others that want it wait.
        with _lock_of(copy):
            if not _usable(copy, wanted):  # nobody else fetched it while this process waited
                local.write(copy, lambda temporary: download.run(wanted, temporary))
                _remember(copy, wanted)
                eviction.added(cache_folder(), copy, wanted.size, budget())
        if not copy.exists():
            line = f"{path}: its copy was deleted at once; {_BUDGET} is too small for these jobs"
            raise PassingTrouble("evicted", line)
        return copy

    return retry.call(attempt)


def _wanted(store: Store, path: str, size: int | None, sha256: str | None) -> Wanted:
    if size is not None and sha256 is not None:
        return Wanted(size, sha256)
    stat = retry.call(lambda: store.stat(path))
    if stat is None:
        # Only the answer to a GET says whether it is the bucket that is absent.
        retry.call(lambda: store.read(path, 0, 1, ""))
        raise DataError(f"{path}: no such object")
    if size is not None and stat.size != size:
        raise DataError(f"{path}: {stat.size} bytes, the index says {size}; {local.AGAIN}")
    return Wanted(stat.size, sha256 or "", stat.version, stat.md5)


def _place(path: str, wanted: Wanted) -> Path:
    key = hashlib.sha256(f"{path} {wanted.name}".encode()).hexdigest()
    name = Path(path).name.encode()[-_NAME_BYTES:].decode(errors="ignore")
    return cache_folder() / "objects" / key[:2] / f"{key[:32]}-{name}"


def _usable(copy: Path, wanted: Wanted, compare: bool = True) -> bool:
    """Whether the copy is there and whole; a use of it is noted. Compared once per process.

    Args:
        compare: if false, what this process has not yet compared counts as unusable.
    """
    try:
        found = copy.stat()
        if found.st_size != wanted.size:
            return False
        if (str(copy), found.st_ino, wanted.sha256) not in _checked:
            if not compare:
                return False
            if wanted.sha256 and local.sha256_of(copy) != wanted.sha256:
                return False
            _remember(copy, wanted)
    except FileNotFoundError:
        return False
    with contextlib.suppress(OSError):  # another user's copy
        os.utime(copy)
    return True


def _remember(copy: Path, wanted: Wanted) -> None:
    with contextlib.suppress(FileNotFoundError):  # deleted already by another process
        _checked.add((str(copy), copy.stat().st_ino, wanted.sha256))


def _lock_of(copy: Path) -> AbstractContextManager[None]:
    # One of 4096 files, so that they do not pile up; two objects that share one wait in turn.
    return locked(cache_folder() / "locks" / copy.name[:3])
