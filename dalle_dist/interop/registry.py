"""Programs whose models are read, by name, in the order in which their files are recognised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Protocol

from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.interop.imported import Imported

# Modules with the functions of `Peer`, imported when first asked for.
PEERS: dict[str, str] = {
    "openai-dvae": "dalle_dist.interop.openai_dvae",
    "mindalle": "dalle_dist.interop.mindalle_files",
    "rudalle": "dalle_dist.interop.rudalle_files",
    "dalle-pytorch": "dalle_dist.interop.dalle_pytorch.files",
}


class Peer(Protocol):
    """What the module of a program has."""

    def detect(self, paths: Sequence[Path]) -> bool:
        """Whether these files are its own; few bytes are read."""

    def load(self, paths: Sequence[Path], tokenizer: Path | None = None, **hints: int) -> Imported:
        """What is in the files. Raises CheckpointError or DataError: not as they should be.

        `hints` are what the files do not say, by names of its own.
        """

    def export(self, imported: Imported, path: Path) -> list[Path]:
        """Write the program's own files; returns them. Raises ConfigError: it has no such model."""


def peer(name: str) -> Peer:
    """Raises ConfigError: no such program."""
    if name not in PEERS:
        raise ConfigError(f"'{name}' is not one of {', '.join(PEERS)}")
    found: Peer = resolve_name(PEERS[name])
    return found


def detect(paths: Sequence[Path]) -> str:
    """The name of the program that wrote the files. Raises CheckpointError: none of those known."""
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file")
    for name in PEERS:
        if peer(name).detect(paths):
            return name
    names = " ".join(map(str, paths))
    raise CheckpointError(f"{names}: not a model of {', '.join(PEERS)}; name its program")
