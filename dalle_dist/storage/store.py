"""What a remote store can do; everything else in this package is written once, on top of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from dalle_dist.errors import DataError
from dalle_dist.paths import scheme_of


class Conflict(Exception):
    """A conditional write that came too late: the object is of another version by now."""


class NoConditions(DataError):
    """The store has no conditional writes."""


@dataclass(frozen=True)
class Stat:
    """An object as it is now."""

    size: int  # bytes
    version: str  # differs when the content does; empty where the store has no such thing
    md5: str = ""  # of the content, if the store says so


class Part(NamedTuple):
    """Bytes of a range, and the size of the whole object where the store said it, else None."""

    data: bytes
    total: int | None


class Page(NamedTuple):
    """Names relative to the listed folder; `after` asks for the next page, empty at the end."""

    names: list[str]
    after: str


@dataclass(frozen=True)
class Content:
    """Bytes to upload: a file's, as many as it has now, or those given."""

    size: int
    read: Callable[[int, int], bytes]  # from, to

    @classmethod
    def of_file(cls, file: Path) -> Content:
        def read(start: int, end: int) -> bytes:
            with file.open("rb") as opened:
                opened.seek(start)
                return opened.read(end - start)

        return cls(file.stat().st_size, read)

    @classmethod
    def of_bytes(cls, data: bytes) -> Content:
        return cls(len(data), lambda start, end: data[start:end])


class Store(Protocol):
    """Each method is one attempt, but for the parts of `put`, which are tried again one by one.

    Raises:
        PassingTrouble: what another attempt may not meet.
        DataError: what it would.
    """

    def stat(self, path: str) -> Stat | None:
        """None when there is no such object."""

    def read(self, path: str, start: int, end: int, version: str) -> Part:
        """Bytes from `start` to `end`, of this version alone unless it is empty."""

    def list_page(self, folder: str, after: str) -> Page:
        """All levels below `folder`; no names when there is no such folder."""

    def put(self, path: str, content: Content) -> str:
        """The object appears whole or not at all; its `Stat.version` if it is known beforehand."""

    def put_if(self, path: str, data: bytes, version: str | None) -> str:
        """Replace an object of this version, or with None create it; the version it then has.

        Raises Conflict: it is of another version, or there; NoConditions.
        """

    def delete(self, path: str) -> None:
        """Nothing happens when there is no such object."""

    def delete_if(self, path: str, version: str) -> None:
        """Raises Conflict: it is of another version, or gone; NoConditions."""


def store_of(path: str) -> Store:
    """For a normal remote path."""
    if scheme_of(path) == "s3":
        from dalle_dist.storage.s3 import S3Store

        return S3Store()
    from dalle_dist.storage.other import OtherStore

    return OtherStore()
