"""The manifest of a checkpoint: what is in it, how it was made, and where training goes on.

It is written last, so that its presence makes a checkpoint whole, and it carries a checksum of
itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from dalle_dist import storage
from dalle_dist.checkpoint.names import MANIFEST
from dalle_dist.errors import CheckpointError

FORMAT = 2


@dataclass(frozen=True)
class FileEntry:
    """One file of tensors.

    bytes   its size
    xxh3    XXH3-128 of its bytes, in hex
    pieces  by `Piece.key`, the number of elements
    """

    bytes: int
    xxh3: str
    pieces: Mapping[str, int]


@dataclass(frozen=True)
class Manifest:
    """All of a checkpoint but its tensors.

    step      finished steps
    layout    how it was made: ranks, nodes, ZeRO stage, number formats; nothing depends on it
    versions  of the software that wrote it
    training  what training goes on from, beside tensors, and `stage`
    config    in force, as a nested mapping
    files     by name; `kind_of` tells what a file is of
    """

    step: int
    layout: Mapping[str, Any]
    versions: Mapping[str, str]
    training: Mapping[str, Any]
    config: Mapping[str, Any]
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files of tensors."""
        return sum(entry.bytes for entry in self.files.values())

    def of_kind(self, kind: str) -> dict[str, FileEntry]:
        return {name: entry for name, entry in self.files.items() if kind_of(name) == kind}

    @property
    def kinds(self) -> list[str]:
        return sorted({kind_of(name) for name in self.files})

    def encoded(self) -> bytes:
        """As its file has it."""
        tree = {"format": FORMAT, **asdict(self)}
        return json.dumps({"checksum": _checksum(tree), **tree}, indent=1).encode()


def file_name(kind: str, rank: int, save: str = "") -> str:
    """Of the file in which a rank's pieces of a kind lie.

    With `save` no other save has it: where files are not renamed together at the end, none may
    replace those of a checkpoint that counts.
    """
    return f"{kind}-rank-{rank:05d}{save and f'.{save}'}.safetensors"


def rank_of(name: str) -> int:
    """Which rank wrote a file."""
    return int(name.rpartition("-rank-")[2].partition(".")[0])


def kind_of(name: str) -> str:
    return name.rpartition("-rank-")[0]


def read_manifest(checkpoint: str) -> Manifest:
    """Raises CheckpointError: none there, damaged, or of another version's format."""
    path = storage.join(checkpoint, MANIFEST)
    if not storage.exists(path):
        raise CheckpointError(f"{checkpoint}: no checkpoint ({MANIFEST} is missing)")
    try:
        tree = json.loads(storage.read_bytes(path))
        checksum, version = tree.pop("checksum", None), tree.pop("format", None)
        if version != FORMAT:
            raise CheckpointError(
                f"{checkpoint}: a checkpoint of format {version or 1}, and this version reads "
                f"{FORMAT}; convert it with the version that wrote it, and go on with train.init"
            )
        if checksum != _checksum({"format": version, **tree}):
            raise ValueError("its checksum differs")
        files = {name: FileEntry(**entry) for name, entry in tree.pop("files").items()}
        return Manifest(**tree, files=files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} is damaged ({error})") from None


def _checksum(tree: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(tree, sort_keys=True).encode()).hexdigest()
