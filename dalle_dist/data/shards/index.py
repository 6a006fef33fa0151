"""`index.json`: what lies in a folder of shards. 250,000 shards take 30 MB of memory."""

from __future__ import annotations

import functools
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from dalle_dist import storage
from dalle_dist.errors import DataError

INDEX = "index.json"
# Value of "captions" in the meta: a sample has one to a line, of which each epoch draws one.
RANDOM_LINE = "random-line"
PARTS = ("train", "held-out")


@dataclass(frozen=True)
class ShardInfo:
    """A shard as the index lists it.

    name         of the tar: relative to the folder of the index, or a path or URL of its own. The
                 side file lies beside the index in any case: `side_beside` of this name
    bytes        of the tar; sha256 of them
    samples      in it
    side_bytes   of the side file; side_sha256 of them
    """

    name: str
    bytes: int
    sha256: str
    samples: int
    side_bytes: int
    side_sha256: str


class ShardTable(Sequence[ShardInfo]):
    """The shards of an index, as columns: a list of objects would take ten times the memory."""

    def __init__(self) -> None:
        self._names: list[bytes] = []
        self._hashes: list[bytes] = []
        self._numbers = array("q")

    @classmethod
    def of(cls, shards: Sequence[ShardInfo]) -> ShardTable:
        table = cls()
        for shard in shards:
            table.add(asdict(shard))
        return table

    def add(self, row: dict[str, Any]) -> None:
        """Raises ValueError, KeyError or TypeError: not a shard."""
        self._numbers.extend((row["bytes"], row["samples"], row["side_bytes"]))
        self._names.append(row["name"].encode("utf-8", "surrogateescape"))
        self._hashes.append(bytes.fromhex(row["sha256"]) + bytes.fromhex(row["side_sha256"]))

    @property
    def samples(self) -> NDArray[np.int64]:
        """Of each shard: [shards]."""
        return np.array(self._numbers, np.int64).reshape(-1, 3)[:, 1]

    @property
    def bytes(self) -> int:
        """Of all tars."""
        return int(np.array(self._numbers, np.int64).reshape(-1, 3)[:, 0].sum())

    @property
    def fingerprint(self) -> str:
        """16 hex digits of what the shards hold, wherever they lie."""
        digest = hashlib.sha256(b"".join(row[:32] for row in self._hashes))
        digest.update(self.samples.tobytes())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, i: int) -> ShardInfo: ...

    @overload
    def __getitem__(self, i: slice) -> list[ShardInfo]: ...

    def __getitem__(self, i: int | slice) -> ShardInfo | list[ShardInfo]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        size, samples, side_bytes = self._numbers[3 * i : 3 * i + 3]
        name, hashes = self._names[i].decode("utf-8", "surrogateescape"), self._hashes[i]
        return ShardInfo(name, size, hashes[:32].hex(), samples, side_bytes, hashes[32:].hex())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and (
            (self._names, self._hashes, self._numbers)
            == (other._names, other._hashes, other._numbers)
        )

    def __hash__(self) -> int:
        return hash((len(self), self.fingerprint))


@dataclass(frozen=True)
class ShardIndex:
    """What lies in a folder of shards. `kind` is "images" or "tokens"."""

    kind: str
    meta: dict[str, Any]
    shards: ShardTable

    @functools.cached_property
    def samples(self) -> int:
        return int(self.shards.samples.sum())

    @property
    def fingerprint(self) -> str:
        """16 hex digits of what the shards hold, wherever they lie."""
        return self.shards.fingerprint

    @classmethod
    def load(cls, folder: str) -> ShardIndex:
        """Raises DataError: no index, not an index, one not to be read, or no samples in it."""
        path = storage.join(folder, INDEX)
        if not _is_there(path):
            raise DataError(
                f"{folder}: no shards here ({INDEX} is missing); tars made elsewhere get one by "
                f"'dalle-dist data index {folder}'"
            )
        shards = ShardTable()
        try:
            tree = json.loads(_content(path), object_hook=_into(shards))
            kind, meta = str(tree["kind"]), dict(tree["meta"])
            if len(tree["shards"]) != len(shards):
                raise DataError(
                    f"{path}: of an earlier version; 'dalle-dist data index {folder}' makes it anew"
                )
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: not an index of shards; build them again") from None
        index = cls(kind, meta, shards)
        if not index.samples:
            raise DataError(f"{folder}: the index lists no samples; build the shards again")
        return index


def parts_of(folder: str) -> list[str]:
    """The folders of shards that a set has: its train/ and held-out/, or itself.

    Raises:
        DataError: it may not be read.
    """
    parts = [storage.join(folder, part) for part in PARTS]
    return [part for part in parts if _is_there(storage.join(part, INDEX))] or [folder]


def _is_there(path: str) -> bool:
    try:
        return storage.exists(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _content(path: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _into(table: ShardTable) -> Any:
    """For `json.loads`: shards go into the table as they are read, and nowhere else."""
    wanted = {field.name for field in fields(ShardInfo)}

    def hook(tree: dict[str, Any]) -> dict[str, Any] | None:
        if tree.keys() != wanted:
            return tree
        table.add(tree)
        return None

    return hook


def write_index(folder: str, kind: str, meta: dict[str, Any], shards: Sequence[ShardInfo]) -> None:
    """What makes shards count; arguments as the fields of `ShardIndex`. Raises DataError."""
    head = json.dumps({"kind": kind, "meta": meta}, indent=1)[:-2]
    text = "".join(_lines(shards))
    path = storage.join(folder, INDEX)
    storage.write_bytes(path, f'{head},\n "shards": [\n{text} ]\n}}\n'.encode())


def _lines(shards: Sequence[ShardInfo]) -> Iterator[str]:
    for i, shard in enumerate(shards, 1):
        yield f"  {json.dumps(asdict(shard))}{',' * (i < len(shards))}\n"


def refuse_used(*folders: str) -> None:
    """Raises DataError when one of the folders holds shards."""
    for folder in folders:
        if storage.exists(storage.join(folder, INDEX)):
            raise DataError(f"{folder}: in use, holds shards already; delete it or choose another")
