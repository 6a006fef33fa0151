"""The texts of the files that configs consist of, on this machine or in a store."""

from __future__ import annotations

from pathlib import Path

from dalle_dist.paths import is_remote, normal


def text_of(path: str) -> str:
    """A file's text.

    Raises:
        OSError: a local file that cannot be read.
        UnicodeDecodeError: not UTF-8.
        DataError: a scheme that nothing here reads, or what the store says.
    """
    path = normal(path)
    if not is_remote(path):
        return Path(path).read_text()
    from dalle_dist import storage

    return storage.read_bytes(path).decode()
