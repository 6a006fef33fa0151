"""Arrays as `.npz` files, local or remote, without pickles; a folder of finished parts of a job."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dalle_dist import storage
from dalle_dist.errors import DataError


def write_arrays(path: str, **arrays: Any) -> None:
    """The whole file or nothing. Raises DataError."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    storage.write_bytes(path, buffer.getvalue())


def read_arrays(path: str) -> dict[str, NDArray[Any]]:
    """What `write_arrays` wrote. Raises DataError: no such file, or a damaged one."""
    try:
        with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        raise DataError(f"{path}: is damaged; remove it") from None


class ArrayStore:
    """Finished parts, each a file by its digest, so that a call that was cut off goes on."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._found = set(storage.list_files(folder))

    def __contains__(self, digest: str) -> bool:
        """Whether the part was there when this call began."""
        return f"{digest}.npz" in self._found

    def write_part(self, digest: str, **arrays: Any) -> None:
        write_arrays(self._path(digest), **arrays)

    def read_part(self, digest: str) -> dict[str, NDArray[Any]]:
        return read_arrays(self._path(digest))

    def remove(self, digests: Iterable[str]) -> None:
        """What is no longer needed; parts of other calls that were cut off stay."""
        for digest in digests:
            storage.remove(self._path(digest))
        storage.remove_empty(self._folder)

    def _path(self, digest: str) -> str:
        return storage.join(self._folder, f"{digest}.npz")
