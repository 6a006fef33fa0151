"""Keys of samples made of the names of files, and which of them are held out."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass

DIGEST = 8  # hex digits that tell the later of two equal keys
SEPARATORS = re.compile(r"[.\\\x00-\x1f\x7f]")


def printable(name: str) -> str:
    """A path as text: bytes that are not UTF-8 as \\xNN."""
    if name.isascii():
        return name
    try:
        data = os.fsencode(name)
    except UnicodeEncodeError:  # half a character, which JSON can hold
        data = name.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def key_of(name: str) -> str:
    """Of a path without its extension. WebDataset splits names at the first dot and at slashes."""
    return SEPARATORS.sub("_", printable(name).replace("/", "__"))


class UniqueKeys:
    """Makes the later of two equal keys another one, by a digest of what it stands for."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def unique(self, key: str, origin: str) -> str:
        found, number = key, 0
        while found in self._taken:
            digest = hashlib.sha256(f"{number} {printable(origin)}".encode()).hexdigest()
            found, number = f"{key}-{digest[:DIGEST]}", number + 1
        self._taken.add(found)
        return found


def share(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on (seed, key) alone."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@dataclass(frozen=True)
class Split:
    """Which keys are held out: those whose share is at most `held_out`.

    Attributes:
        held: a key that is held out whatever its share, so that a small set holds one out.
        trained: likewise one that is trained on.
    """

    seed: int
    held_out: float
    held: str | None = None
    trained: str | None = None

    def part(self, key: str) -> str:
        """ "train" or "held-out"."""
        if key in (self.held, self.trained):
            return "held-out" if key == self.held else "train"
        return "held-out" if share(key, self.seed) <= self.held_out else "train"
