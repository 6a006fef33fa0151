"""Local files: whole or not at all, flushed before they count, verified where a hash is known."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle_dist.errors import DataError

TEMPORARY = ".part-"  # how names of unfinished files begin
AGAIN = "fetch or build the file again"
_verified: set[tuple[str, int, int, str]] = set()


def write(target: Path, fill: Callable[[Path], Any]) -> None:
    """Fill a temporary file beside `target`, flush it to the disk, rename it. Raises DataError."""
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=TEMPORARY)
        os.close(descriptor)
        temporary = Path(name)
        fill(temporary)
        flush(temporary)
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        raise not_written(target, error) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def move(file: Path, target: Path) -> None:
    """Rename a finished file of the same disk. Raises DataError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        flush(file)
        file.replace(target)
    except OSError as error:
        raise not_written(target, error) from None


def flush(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def not_written(path: Path | str, error: OSError) -> DataError:
    """The one line for a write that failed."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    why = "the disk is full; free some space" if full else error.strerror or str(error)
    return DataError(f"{path}: could not be written ({why})")


def sha256_of(path: Path) -> str:
    """In hex."""
    return digest_of(path, "sha256")


def digest_of(path: Path, kind: str) -> str:
    """Of a file's content, in hex; `kind` as hashlib calls it."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verified(path: Path, size: int | None, sha256: str | None) -> Path:
    """The file itself, compared with what is known of it once per process.

    Raises:
        DataError: no such file, or another size or hash.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    stat = path.stat()
    if size is not None and stat.st_size != size:
        raise DataError(f"{path}: {stat.st_size} bytes, the index says {size}; {AGAIN}")
    if sha256 is not None:
        key = (str(path), stat.st_size, stat.st_mtime_ns, sha256)
        if key not in _verified:
            if sha256_of(path) != sha256:
                raise DataError(f"{path}: sha256 differs from the index; {AGAIN}")
            _verified.add(key)
    return path
