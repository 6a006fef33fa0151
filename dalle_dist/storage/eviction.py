"""Keeps the cache within its budget: copies that were used longest ago go first.

Times of use are set by hand (`os.utime`), since many disks are mounted without access times.
`locks/eviction` holds the bytes that were added up since the copies were last counted, and is the
lock of whoever changes that number. A file that is deleted while it is open stays readable.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from dalle_dist.storage import local
from dalle_dist.storage.locks import held_by_nobody, locked

IN_USE = 60.0  # seconds after a use in which a copy stays if the budget allows it
ABANDONED = 24 * 3600.0  # seconds after which an unfinished file is nobody's
_SLACK = 20  # a twentieth of the budget is freed at least, so that not every fetch counts anew


class _Copy(NamedTuple):
    used: float  # seconds since the epoch
    size: int  # bytes
    path: Path
    linked: bool  # a folder that is read has it too, so that deleting it would free nothing


def added(cache: Path, copy: Path, size: int, budget: int) -> None:
    """Note a new copy of `size` bytes, and delete others when all take more than `budget` bytes.

    Raises DataError when the cache cannot be written to.
    """
    total = cache / "locks" / "bytes"
    try:
        with locked(cache / "locks" / "eviction"):
            known = _read(total)
            now = None if known is None else known + size
            if now is None or now > budget:
                now = _evict(cache, copy, budget)
            total.write_text(str(now))
    except OSError as error:
        raise local.not_written(total, error) from None


def _read(total: Path) -> int | None:
    """None when nobody counted so far, or the count was cut short."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(total.read_text())
    return None


def _evict(cache: Path, keep: Path, budget: int) -> int:
    """Bytes of the copies that are left; `keep` is among them whatever it takes."""
    copies = _copies(cache)
    _remove_abandoned(cache)
    left = sum(copy.size for copy in copies)
    if left <= budget:
        return left
    now = time.time()
    # Those in use only if the others are not enough, again the longest unused first.
    copies.sort(key=lambda copy: (copy.linked, now - copy.used < IN_USE, copy.used))
    for copy in copies:
        idle = not copy.linked and now - copy.used >= IN_USE
        if left <= (budget - budget // _SLACK if idle else budget):
            break
        if copy.path != keep:
            copy.path.unlink(missing_ok=True)
            left -= copy.size
    return left


def _copies(cache: Path) -> list[_Copy]:
    found = []
    for path in (cache / "objects").glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            if not path.name.startswith(local.TEMPORARY):
                found.append(_Copy(stat.st_mtime, stat.st_size, path, stat.st_nlink > 1))
    return found


def _remove_abandoned(cache: Path) -> None:
    """What processes that were killed left: unfinished files and folders of links."""
    for path in (cache / "objects").glob(f"*/{local.TEMPORARY}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
    for lock in (cache / "folders").glob("*.lock"):
        if held_by_nobody(lock, ABANDONED):
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
