"""Elements of tensors out of files in which they lie in pieces, whoever cut them.

The number formats of moments are translated: what a checkpoint has in fp32 may be wanted in 16
bits, and the other way round.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from dalle_kernels.minifloat import pack, unpack
from torch import Tensor

from dalle_dist import storage
from dalle_dist.checkpoint.formats import shapes_in
from dalle_dist.checkpoint.manifest import Manifest
from dalle_dist.checkpoint.tensor_file import Slot, read_elements, read_header
from dalle_dist.errors import CheckpointError
from dalle_dist.gradients.piece import Piece, name_and_start

# How `moments: 16-bit` packs them (paper D).
PACKED = {"exp_avg": "1-6-9", "exp_avg_sq": "0-6-10"}
_ELEMENTS = 1 << 24  # that are read at a time


@dataclass(frozen=True)
class Source:
    """Consecutive elements of one parameter in one file."""

    start: int
    numel: int
    file: str
    key: str  # in the file


class TensorSource:
    """Pieces of the tensors of one kind; files are fetched when they are first needed.

    Args:
        kind: decides how 16-bit numbers are packed.
    """

    def __init__(self, kind: str, sources: Mapping[str, Sequence[Source]]) -> None:
        self.kind = kind
        self._sources = {
            name: sorted(found, key=lambda source: source.start) for name, found in sources.items()
        }
        self._headers: dict[str, dict[str, Slot]] = {}
        self._paths: dict[str, Path] = {}

    @classmethod
    def of_checkpoint(cls, checkpoint: str, manifest: Manifest, kind: str) -> TensorSource:
        sources: dict[str, list[Source]] = {}
        for file, entry in manifest.of_kind(kind).items():
            for key, numel in entry.pieces.items():
                name, start = name_and_start(key)
                found = Source(start, numel, storage.join(checkpoint, file), key)
                sources.setdefault(name, []).append(found)
        return cls(kind, sources)

    @classmethod
    def of_files(cls, files: Sequence[str]) -> TensorSource:
        """Whole tensors in safetensors files, as in a release. Raises CheckpointError."""
        sources = {
            name: [Source(0, torch.Size(shape).numel(), file, name)]
            for file in files
            for name, (_, shape) in shapes_in([file]).items()
        }
        return cls("weights", sources)

    @cached_property
    def numels(self) -> dict[str, int]:
        """Elements of each tensor. Raises CheckpointError: pieces are missing or doubled."""
        return {name: _contiguous(name, found) for name, found in self._sources.items()}

    def require(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Raise CheckpointError unless these tensors are here, whole, and no others."""
        wanted = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        wrong = sorted(
            name
            for name in wanted.keys() | self.numels.keys()
            if wanted.get(name) != self.numels.get(name)
        )
        if wrong:
            name = wrong[0]
            raise CheckpointError(
                f"{where}: {len(wrong)} tensors do not fit the model, first '{name}': "
                f"{wanted.get(name, 'no')} elements wanted, {self.numels.get(name, 'none')} there"
            )

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One whole tensor in fp32, on the CPU. Raises CheckpointError: it is not all there."""
        values = torch.empty(torch.Size(shape).numel())
        self.read(name, 0, values)
        return values.view(shape)

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, flat, from an element on. Raises CheckpointError: they are not all there."""
        if not self.fill([Piece(name, start, out)]):
            raise CheckpointError(f"'{name}' is not all there")

    def fill(self, pieces: Sequence[Piece]) -> bool:
        """Write what is here of the pieces into their values; whether that was every element."""
        filled = [self._fill(piece) for piece in pieces]  # each, also after one that is not here
        return all(filled)

    def _fill(self, piece: Piece) -> bool:
        filled = 0
        for source in self._overlapping(piece):
            first = max(source.start, piece.start)
            last = min(source.start + source.numel, piece.start + piece.values.numel())
            for at in range(first, last, _ELEMENTS):
                end = min(at + _ELEMENTS, last)
                out = piece.values.view(-1)[at - piece.start : end - piece.start]
                self._read(source, at - source.start, out)
            filled += last - first
        return filled == piece.values.numel()

    def _read(self, source: Source, first: int, out: Tensor) -> None:
        path, slot = self._local(source.file), self._slot(source)
        if slot.dtype == out.dtype and out.device.type == "cpu":
            read_elements(path, slot, first, out)
        else:
            found = torch.empty(out.numel(), dtype=slot.dtype)
            read_elements(path, slot, first, found)
            out.copy_(self._translated(found, out.dtype))

    def _local(self, file: str) -> Path:
        """Fetched once: a store would be asked for its version each time."""
        path = self._paths.get(file)
        if path is None or not path.exists():
            path = self._paths[file] = storage.fetch(file)
        return path

    def _overlapping(self, piece: Piece) -> Iterator[Source]:
        sources = self._sources.get(piece.name, [])
        at = max(bisect_right(sources, piece.start, key=lambda source: source.start) - 1, 0)
        for source in sources[at:]:
            if source.start >= piece.start + piece.values.numel():
                return
            if source.start + source.numel > piece.start:
                yield source

    def _slot(self, source: Source) -> Slot:
        if source.file not in self._headers:
            self._headers[source.file] = read_header(self._local(source.file))[0]
        slot = self._headers[source.file].get(source.key)
        if slot is None or torch.Size(slot.shape).numel() != source.numel:
            raise CheckpointError(f"{source.file}: '{source.key}' is not as the manifest has it")
        return slot

    def _translated(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        if (values.dtype == torch.uint16) == (dtype == torch.uint16):
            return values
        if self.kind not in PACKED:
            raise CheckpointError(f"16-bit numbers as {self.kind}: only moments are packed")
        if dtype == torch.uint16:
            return pack(values.float(), PACKED[self.kind])
        return unpack(values, PACKED[self.kind])


def _contiguous(name: str, sources: Sequence[Source]) -> int:
    end = 0
    for source in sources:
        if source.start != end:
            raise CheckpointError(
                f"'{name}': elements {end} to {source.start} are missing or doubled"
            )
        end += source.numel
    return end
