"""Files of `torch.save`, each written whole or not at all. They are never read here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dalle_dist import storage
from dalle_dist.errors import CheckpointError


class Export:
    """A folder that is filled, local or remote; `files` are what was written, by their paths.

    Raises CheckpointError: `mark`, a file that is written last, lies there.
    """

    def __init__(self, out: str, mark: str) -> None:
        self.out, self._mark, self.files = storage.normal(out), mark, list[str]()
        if storage.exists(storage.join(self.out, mark)):
            raise CheckpointError(f"{out}: holds an export already ({mark}); choose another folder")

    def save(self, name: str, value: Any) -> None:
        self._publish(name, lambda folder: _saved(value, folder / "pickle"))

    def make(self, name: str, make: Callable[[Path], str]) -> None:
        """A file that `make` puts into a folder, under the name that it returns."""
        self._publish(name, lambda folder: folder / make(folder))

    def finish(self, text: str) -> list[str]:
        """Write the mark, and return all files."""
        path = storage.join(self.out, self._mark)
        storage.write_bytes(path, text.encode())
        return [*self.files, path]

    def _publish(self, name: str, make: Callable[[Path], Path]) -> None:
        path = storage.join(self.out, name)
        near = storage.cache_folder() if storage.is_remote(path) else Path(path).parent
        with tempfile.TemporaryDirectory(dir=storage.made(str(near)), prefix=".writing-") as folder:
            file = make(Path(folder))
            storage.publish(file, path)
        self.files.append(path)


def _saved(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path
