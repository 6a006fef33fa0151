"""Stores of all other schemes, by fsspec and the package that it names for each."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

from dalle_dist.errors import DataError
from dalle_dist.paths import scheme_of
from dalle_dist.storage.retry import ObjectChanged, PassingTrouble
from dalle_dist.storage.store import Content, NoConditions, Page, Part, Stat

READ_ONLY = ("http", "https", "github", "git", "zip", "tar", "data")
# How stores call what differs when an object's content does.
_VERSION = (
    "etag", "ETag", "generation", "md5Hash", "content_md5", "oid", "blob_id", "mtime",
    "LastModified", "last_modified", "updated", "created",
)  # fmt: skip


class OtherStore:
    """`Store` of every scheme that fsspec knows; a store's own retries are its package's."""

    def stat(self, path: str) -> Stat | None:
        with _system(path) as (system, name):
            try:
                info = system.info(name)
            except FileNotFoundError:
                return None
        if info.get("type") == "directory" or info.get("size") is None:
            return None
        version = "/".join(str(info[key]) for key in _VERSION if info.get(key))
        return Stat(int(info["size"]), version)

    def read(self, path: str, start: int, end: int, version: str) -> Part:
        with _system(path) as (system, name):
            try:
                data = system.cat_file(name, start=start, end=end)
            except FileNotFoundError:
                raise DataError(f"{path}: no such object") from None
        if version:  # no such store takes a version with a range; a change is noticed afterwards
            now = self.stat(path)
            if now is None or now.version != version:
                raise ObjectChanged(path)
        return Part(data, None)

    def list_page(self, folder: str, after: str) -> Page:
        with _system(folder) as (system, name):
            prefix = name.rstrip("/") + "/"
            try:
                found = system.find(name)
            except FileNotFoundError:
                return Page([], "")
        return Page([file[len(prefix) :] for file in found if file.startswith(prefix)], "")

    def put(self, path: str, content: Content) -> str:
        require_writable(path)
        with _system(path) as (system, name):
            folder, _, last = name.rpartition("/")
            temporary = f"{folder}/.{last}.{uuid.uuid4().hex}"
            with contextlib.suppress(NotImplementedError):
                system.makedirs(folder, exist_ok=True)
            try:
                _fill(system, temporary, content)
                system.mv(temporary, name)
            except BaseException:
                with contextlib.suppress(Exception):  # the error that counts is on its way
                    system.rm_file(temporary)
                raise
        return ""

    def delete(self, path: str) -> None:
        require_writable(path)
        with _system(path) as (system, name), contextlib.suppress(FileNotFoundError):
            system.rm_file(name)

    def put_if(self, path: str, data: bytes, version: str | None) -> str:
        raise NoConditions(f"{path}: no conditional writes to {scheme_of(path)}:// from here")

    def delete_if(self, path: str, version: str) -> None:
        raise NoConditions(f"{path}: no conditional writes to {scheme_of(path)}:// from here")


def require_writable(path: str) -> None:
    """Raises DataError for a scheme that is for reading alone."""
    scheme = scheme_of(path)
    if scheme in READ_ONLY:
        raise DataError(f"{path}: {scheme}:// can only be read; write to a folder, or to s3://")


def _fill(system: Any, name: str, content: Content) -> None:
    step = 8 << 20
    with system.open(name, "wb") as file:
        for start in range(0, content.size, step):
            file.write(content.read(start, min(start + step, content.size)))


@contextlib.contextmanager
def _system(path: str) -> Iterator[tuple[Any, str]]:
    """The file system of a path and the name in it; its errors become lines."""
    import fsspec

    try:
        # A listing kept from before would hide what other processes wrote since.
        yield fsspec.core.url_to_fs(path, use_listings_cache=False)
    except (DataError, PassingTrouble):
        raise
    except PermissionError as error:
        raise DataError(f"{path}: access denied ({_text(error)})") from None
    except NotImplementedError:
        raise DataError(f"{path}: {scheme_of(path)}:// cannot do this; use s3://") from None
    except (ValueError, TypeError, ImportError) as error:
        raise DataError(f"{path}: {_text(error)}") from None
    except Exception as error:  # packages have errors of their own, whose classes are unknown here
        raise PassingTrouble("store", f"{path}: {_text(error)}") from None


def _text(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
