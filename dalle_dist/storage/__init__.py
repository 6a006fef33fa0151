"""Files and S3 objects by one path: reading goes through a local cache, writing is atomic.

A path is local, or `s3://bucket/key`; the endpoint comes from AWS_ENDPOINT_URL where it is not
Amazon's. The cache lies in $DALLE_DIST_CACHE, else ~/.cache/dalle-dist.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle_dist.errors import DataError

SCHEME = "s3://"
RETRIES = {"max_attempts": 8, "mode": "adaptive"}
LAST = ("index.json", "manifest.json", "config.yaml")  # what makes a folder count goes up last


def is_remote(path: str) -> bool:
    return path.startswith(SCHEME)


def join(path: str, *parts: str) -> str:
    return "/".join([path.rstrip("/"), *parts])


def cache_folder() -> Path:
    return Path(os.environ.get("DALLE_DIST_CACHE") or Path.home() / ".cache" / "dalle-dist")


def configure(folder: str, budget: int) -> None:
    pass


def cache_budget() -> int:
    return 100 * 10**9


def retries() -> dict[str, int]:
    return {}


def exists(path: str) -> bool:
    return _head(path) is not None if is_remote(path) else Path(path).exists()


def fetch(path: str, size: int | None = None, sha256: str | None = None) -> Path:
    """As `_fetch`, with size and content as they should be."""
    local = _fetch(path)
    if size is not None and local.stat().st_size != size:
        raise DataError(f"{path}: {local.stat().st_size} bytes, expected {size}")
    if sha256 is not None and hashlib.sha256(local.read_bytes()).hexdigest() != sha256:
        raise DataError(f"{path}: sha256 differs from the index")
    return local


def _fetch(path: str) -> Path:
    """A local file with the content of `path`: itself, or its copy in the cache.

    A cached copy counts only while the object's ETag and size are the ones it was fetched with.

    Raises:
        DataError: no such file, or the object did not arrive whole.
    """
    if not is_remote(path):
        if not Path(path).is_file():
            raise DataError(f"{path}: no such file")
        return Path(path)
    head = _head(path)
    if head is None:
        raise DataError(f"{path}: no such object")
    key = hashlib.sha256(f"{path} {head['ETag']} {head['ContentLength']}".encode()).hexdigest()
    local = cache_folder() / "objects" / key[:2] / f"{key[:32]}-{Path(path).name}"
    if not local.exists() or local.stat().st_size != head["ContentLength"]:
        _write(local, lambda temporary: _download(path, head, temporary))
    return local


def fetch_folder(path: str, suffixes: tuple[str, ...] = ("",)) -> Path:
    """A local folder with the files of `path`: itself, or links into the cache, made anew.

    Args:
        suffixes: of the names of those that are fetched.

    Raises:
        DataError: no such folder, or an object did not arrive whole.
    """
    if not is_remote(path):
        if not Path(path).is_dir():
            raise DataError(f"{path}: no such folder")
        return Path(path)
    names = [name for name in list_files(path) if name.endswith(suffixes)]
    if not names:
        raise DataError(f"{path}: no such folder")
    digest = hashlib.sha256(path.encode()).hexdigest()[:32]
    parent = cache_folder() / "folders"
    parent.mkdir(parents=True, exist_ok=True)
    # One folder per call: another process may be reading an earlier one.
    root = Path(tempfile.mkdtemp(dir=parent, prefix=f"{digest}-"))
    for name in names:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(fetch(join(path, name)).absolute())
    return root


def read_bytes(path: str) -> bytes:
    """Raises DataError when there is no such file."""
    return fetch(path).read_bytes()


def list_files(folder: str) -> list[str]:
    """Names relative to `folder`, all levels, sorted; empty when there is no such folder."""
    if not is_remote(folder):
        root = Path(folder)
        return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    bucket, prefix = _split(join(folder, ""))
    pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    listed = _call(folder, lambda: list(pages))
    keys = [entry["Key"] for page in listed for entry in page.get("Contents", [])]
    return sorted(key[len(prefix) :] for key in keys)


def write_bytes(path: str, data: bytes) -> None:
    """Write the whole file or nothing; folders on the way are made. Raises DataError."""
    if is_remote(path):
        bucket, key = _split(path)
        _call(path, lambda: _client().put_object(Bucket=bucket, Key=key, Body=data))
    else:
        _write(Path(path), lambda temporary: temporary.write_bytes(data))


def publish(local: Path, path: str) -> None:
    """Move a finished local file to `path`: a rename, or an upload. Raises DataError."""
    if is_remote(path):
        bucket, key = _split(path)
        _call(path, lambda: _client().upload_file(str(local), bucket, key))
        local.unlink()
    else:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            _flush(local)
            local.replace(path)
        except OSError as error:
            raise not_written(path, error) from None


def remove(path: str) -> None:
    """Delete a file; nothing happens when there is none. Raises DataError for remote trouble."""
    if is_remote(path):
        bucket, key = _split(path)
        _call(path, lambda: _client().delete_object(Bucket=bucket, Key=key))
    else:
        Path(path).unlink(missing_ok=True)


def made(folder: str) -> Path:
    """A local folder, made if it is not there. Raises DataError."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(folder, error) from None
    return Path(folder)


def remove_empty(folder: str) -> None:
    """Delete a local folder in which nothing lies; of remote ones there are none."""
    if not is_remote(folder):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def not_written(path: Path | str, error: OSError) -> DataError:
    """The one line for a write that failed."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    why = "the disk is full; free some space" if full else error.strerror or str(error)
    return DataError(f"{path}: could not be written ({why})")


def publish_folder(local: Path, path: str) -> None:
    """Upload the files of `local` that changed since the last call, those that count last."""
    bucket, prefix = _split(join(path, ""))
    ledger = local / ".uploaded.json"
    known: dict[str, list[float]] = json.loads(ledger.read_text()) if ledger.exists() else {}
    names = [n for n in list_files(str(local)) if not Path(n).name.startswith(".")]
    names.sort(key=lambda name: (Path(name).name in LAST, name))
    for name in names:
        stat = (local / name).stat()
        if known.get(name) != [stat.st_size, stat.st_mtime]:
            upload = functools.partial(
                _client().upload_file, str(local / name), bucket, prefix + name
            )
            _call(join(path, name), upload)
            known[name] = [stat.st_size, stat.st_mtime]
    for name in sorted(known.keys() - set(names)):
        delete = functools.partial(_client().delete_object, Bucket=bucket, Key=prefix + name)
        _call(join(path, name), delete)
        del known[name]
    write_bytes(str(ledger), json.dumps(known).encode())


def _write(target: Path, fill: Callable[[Path], Any]) -> None:
    """Fill a temporary file beside `target`, flush it to the disk, rename it."""
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(descriptor)
        temporary = Path(name)
        fill(temporary)
        _flush(temporary)
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        raise not_written(target, error) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _download(path: str, head: dict[str, Any], target: Path) -> None:
    bucket, key = _split(path)
    _call(path, lambda: _client().download_file(bucket, key, str(target)))
    found, wanted = target.stat().st_size, head["ContentLength"]
    if found != wanted:
        raise DataError(f"{path}: {found} of {wanted} bytes arrived; try again")


def _head(path: str) -> dict[str, Any] | None:
    from botocore.exceptions import ClientError

    bucket, key = _split(path)

    def request() -> dict[str, Any] | None:
        try:
            head: dict[str, Any] = _client().head_object(Bucket=bucket, Key=key)
            return head
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise

    found: dict[str, Any] | None = _call(path, request)
    return found


def _call(path: str, request: Callable[[], Any]) -> Any:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return request()
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise DataError(f"{path}: {' '.join(str(error).split())}") from None


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise DataError(f"{path}: no bucket; write s3://bucket/key")
    return bucket, key


def _client() -> Any:
    return _client_of(os.environ.get("AWS_ENDPOINT_URL"), os.getpid())


@functools.lru_cache(maxsize=4)
def _client_of(endpoint: str | None, _process: int) -> Any:
    """One client per endpoint and process: its connections must not be shared over a fork."""
    import boto3
    from botocore.config import Config

    return boto3.client("s3", endpoint_url=endpoint, config=Config(retries=RETRIES))
