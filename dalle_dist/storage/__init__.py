"""Files of this machine and of remote stores by one path: copies are cached, writing is atomic.

A path is local (`~` and `file://` too), `s3://bucket/key`, or of any scheme whose fsspec package is
installed: `paths.py` of the package above. Every remote request is tried again by one policy
(`retry.py`), what arrives is compared (`transfer.py`), what goes up is verified (`upload.py`), and
copies lie in a cache of bounded size (`cache.py`). A store itself does little: `store.py`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from dalle_dist.errors import DataError
from dalle_dist.paths import inside, is_remote, join, normal
from dalle_dist.storage import cache, local, mirror, retry, upload
from dalle_dist.storage.cache import budget as cache_budget
from dalle_dist.storage.cache import cache_folder, configure
from dalle_dist.storage.local import not_written
from dalle_dist.storage.mirror import file_names
from dalle_dist.storage.retry import retries
from dalle_dist.storage.store import Content, store_of
from dalle_dist.storage.upload import LAST

__all__ = [
    "LAST", "cache_budget", "cache_folder", "configure", "exists", "fetch", "fetch_folder",
    "file_names", "inside", "is_remote", "join", "list_files", "made", "normal", "not_written",
    "publish",
    "publish_folder", "read_bytes", "remove", "remove_empty", "retries", "write_bytes",
]  # fmt: skip


def exists(path: str) -> bool:
    """Whether there is such a file, object or local folder. Raises DataError for remote trouble."""
    path = normal(path)
    if not is_remote(path):
        return Path(path).exists()
    store = store_of(path)
    return retry.call(lambda: store.stat(path)) is not None


def fetch(path: str, size: int | None = None, sha256: str | None = None) -> Path:
    """A local file with the content of `path`: itself, or its copy in the cache.

    With `size` (bytes) and `sha256` (hex) the caller's index is the authority: a wrong body is
    fetched again, and the store is not asked which version it has. Without a hash a copy counts
    only while the object's ETag and size are the ones it was fetched with. A copy may be deleted
    when the cache is full: open it soon, and fetch it again before opening it again.

    Raises:
        DataError: no such file, another size or hash than these, or it did not arrive whole.
    """
    path = normal(path)
    if not is_remote(path):
        return local.verified(Path(path), size, sha256)
    return cache.fetch(store_of(path), path, size, sha256)


def fetch_folder(path: str, suffixes: tuple[str, ...] = ("",)) -> Path:
    """A local folder with the files of `path`: itself, or links into the cache, made anew.

    The links go when the process ends. Objects whose keys are no names of files are left out, and
    their number printed.

    Args:
        suffixes: of the names of those that are fetched.

    Raises:
        DataError: no such folder, or an object did not arrive whole.
    """
    path = normal(path)
    if is_remote(path):
        return mirror.mirror(path, suffixes)
    if not Path(path).is_dir():
        raise DataError(f"{path}: no such folder")
    return Path(path)


def read_bytes(path: str) -> bytes:
    """Raises DataError when there is no such file."""
    return fetch(path).read_bytes()


def list_files(folder: str) -> list[str]:
    """Names relative to `folder`, all levels, sorted; empty when there is no such folder.

    Of remote ones, objects that stand for folders (their keys end with `/`) are left out.
    """
    folder = normal(folder)
    if is_remote(folder):
        return mirror.names_in(folder)
    root = Path(folder)
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def write_bytes(path: str, data: bytes) -> None:
    """Write the whole file or nothing; folders on the way are made. Raises DataError."""
    path = normal(path)
    if is_remote(path):
        upload.upload(path, Content.of_bytes(data))
    else:
        local.write(Path(path), lambda temporary: temporary.write_bytes(data))


def publish(file: Path, path: str) -> None:
    """Move a finished local file to `path`: a rename, or a verified upload. Raises DataError."""
    path = normal(path)
    if is_remote(path):
        upload.upload(path, Content.of_file(file))
        file.unlink()
    else:
        local.move(file, Path(path))


def publish_folder(folder: Path, path: str) -> None:
    """Upload the files of `folder` that changed since the last call, those that count last.

    What was deleted since is deleted there; files whose names begin with a dot stay here.

    Raises:
        DataError: remote trouble.
    """
    upload.upload_folder(folder, normal(path))


def remove(path: str) -> None:
    """Delete a file; nothing happens when there is none. Raises DataError for remote trouble."""
    path = normal(path)
    if is_remote(path):
        store = store_of(path)
        retry.call(lambda: store.delete(path))
    else:
        Path(path).unlink(missing_ok=True)


def made(folder: str) -> Path:
    """A local folder, made if it is not there. Raises DataError."""
    root = Path(normal(folder))
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(root, error) from None
    return root


def remove_empty(folder: str) -> None:
    """Delete a local folder in which nothing lies; of remote ones there are none."""
    if not is_remote(folder):
        with contextlib.suppress(OSError):
            Path(normal(folder)).rmdir()
