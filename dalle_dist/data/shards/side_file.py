"""The Parquet file beside a tar: key, caption and place of each sample.

Columns: `key`, `caption`, `width` and `height` (null where the sample's json has none), and for
each extension of its files `EXTENSION.offset` and `EXTENSION.bytes`, null in samples without one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dalle_dist.errors import DataError

SUFFIX = ".samples.parquet"
DIGEST = 8  # hex digits of the folder of a tar that lies elsewhere
OFFSET, BYTES = ".offset", ".bytes"
CAPTION_EXTENSION, ABOUT_EXTENSION = "txt", "json"
Extents = dict[str, tuple[int, int]]  # extension -> (offset, bytes)


def side_name(tar: str) -> str:
    """Of the side file of a tar, by its name or path."""
    return tar.removesuffix(".tar") + SUFFIX


def side_beside(name: str) -> str:
    """Of the side file beside an index that lists a tar under `name`.

    A tar that lies elsewhere gives its base name and a digest of the rest: two may have one name.
    """
    folder, slash, last = name.rpartition("/")
    if not slash:
        return side_name(name)
    digest = hashlib.sha256(folder.encode("utf-8", "surrogateescape")).hexdigest()
    return side_name(f"{last.removesuffix('.tar')}-{digest[:DIGEST]}.tar")


class SideRows:
    """The rows of a side file that is being made."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._captions: list[str] = []
        self._abouts: list[bytes] = []
        self._extents: list[Extents] = []

    def add(self, key: str, files: dict[str, bytes], extents: Extents) -> None:
        """A sample; `files` may be those alone that a caption and a size come from."""
        self._keys.append(key)
        self._captions.append(files.get(CAPTION_EXTENSION, b"").decode(errors="replace"))
        self._abouts.append(files.get(ABOUT_EXTENSION, b"null"))
        self._extents.append(extents)

    def write(self, path: Path) -> None:
        """Raises OSError."""
        import pyarrow
        from pyarrow import parquet

        sizes = [_size(about) for about in _parsed(self._abouts)]
        columns: dict[str, Any] = {
            "key": pyarrow.array(self._keys, pyarrow.string()),
            "caption": pyarrow.array(self._captions, pyarrow.string()),
            "width": pyarrow.array([width for width, _ in sizes], pyarrow.int32()),
            "height": pyarrow.array([height for _, height in sizes], pyarrow.int32()),
        }
        for extension in sorted({name for extents in self._extents for name in extents}):
            places = [extents.get(extension, (None, None)) for extents in self._extents]
            columns[extension + OFFSET] = pyarrow.array([o for o, _ in places], pyarrow.int64())
            columns[extension + BYTES] = pyarrow.array([b for _, b in places], pyarrow.int32())
        # Of a path, pyarrow takes what stands before a colon for a scheme.
        with path.open("wb") as file:
            parquet.write_table(pyarrow.table(columns), file, compression="zstd")

    def __len__(self) -> int:
        return len(self._keys)


def _parsed(abouts: list[bytes]) -> list[Any]:
    """Of JSON texts, what they say; None for what is no JSON."""
    try:
        found: list[Any] = json.loads(b"[" + b",".join(abouts) + b"]")
    except ValueError:
        found = []
    if len(found) == len(abouts):
        return found
    return [_alone(about) for about in abouts]


def _alone(about: bytes) -> Any:
    try:
        return json.loads(about)
    except ValueError:
        return None


def _size(about: Any) -> tuple[int | None, int | None]:
    try:
        return int(about["width"]), int(about["height"])
    except (ValueError, KeyError, TypeError):
        return None, None


class SideFile:
    """Where the files of a shard's samples lie.

    Raises DataError: not a side file; FileNotFoundError: there is none.

    keys      of the samples, an Arrow array of strings
    extents   by extension, (offsets, bytes) of all samples, -1 where a sample has no such file
    """

    def __init__(self, path: Path, name: str) -> None:
        import pyarrow
        from pyarrow import parquet

        self.extents: dict[str, tuple[NDArray[np.int64], NDArray[np.int32]]] = {}
        try:
            with pyarrow.memory_map(str(path)) as mapped, parquet.ParquetFile(mapped) as file:
                names = [n for n in file.schema_arrow.names if n.endswith((OFFSET, BYTES))]
                table = file.read(["key", *names], use_threads=False)
            self.keys = table.column("key").combine_chunks()
            for extension in [n.removesuffix(OFFSET) for n in names if n.endswith(OFFSET)]:
                offsets, sizes = table.column(extension + OFFSET), table.column(extension + BYTES)
                self.extents[extension] = (
                    np.array(offsets.fill_null(-1).to_numpy()),
                    np.array(sizes.fill_null(-1).to_numpy()),
                )
        except FileNotFoundError:
            raise
        except (pyarrow.ArrowException, KeyError, OSError):
            raise DataError(
                f"{name}: not a side file of a shard; 'dalle-dist data index' makes it anew"
            ) from None

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, sample: int) -> str:
        return str(self.keys[sample].as_py())


def read_column(path: Path, column: str) -> Iterator[Any]:
    """The values of one column of a side file, None for null."""
    import pyarrow
    from pyarrow import parquet

    with pyarrow.memory_map(str(path)) as mapped, parquet.ParquetFile(mapped) as file:
        yield from file.read([column], use_threads=False).column(column).to_pylist()
