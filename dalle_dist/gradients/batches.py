"""Pieces that play the same part in all layers, as one batch: an operation for 64 layers, not 64.

Where they lie evenly spaced in one buffer, as under ZeRO-3, a batch is a view of it. Elsewhere it
is a list of tensors, copied chunk by chunk into scratch memory where they must lie together.

Shapes: B pieces of a batch, then the shape of each; K1 resblocks and, as the last, what is in none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_dist.gradients.piece import Block, Piece

SCRATCH_BYTES = 2**28  # that one operation on a batch may take beside what it works on
Cut = Callable[[Piece], Iterable[Piece]]
WaveOf = Callable[[Piece], int]


@dataclass(frozen=True)
class Kind:
    """What the batch of one part of all layers has at every step.

    keys, names, blocks   of each piece; `Piece.key`
    shape    of each piece
    wave     in which they are sent; `waves.py`
    slot_B   index of its resblock, K for none; on the device
    members  (index of the gradient that it is cut from, first element in it) of each piece
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    blocks: tuple[Block, ...]
    shape: torch.Size
    wave: int
    slot_B: Tensor
    members: tuple[tuple[int, int], ...]


class Batch:
    """The values of this step, of one kind: a view [B, ...] or a list of B views."""

    def __init__(self, kind: Kind, values: Tensor | list[Tensor]) -> None:
        self.kind, self._values = kind, values

    def __len__(self) -> int:
        return len(self.kind.keys)

    @property
    def numel(self) -> int:
        return len(self) * self.kind.shape.numel()

    @property
    def chunks(self) -> list[slice]:
        """All pieces, as ranges of no more than SCRATCH_BYTES each if they are more than one."""
        count = max(1, SCRATCH_BYTES // (4 * max(1, self.kind.shape.numel())))
        return [slice(at, min(at + count, len(self))) for at in range(0, len(self), count)]

    def norms(self) -> Tensor:
        """Euclidean norm of each piece [B]; not finite where an element is not."""
        if isinstance(self._values, list):
            return torch.stack(torch._foreach_norm(self._values))
        return torch.linalg.vector_norm(self._values.view(len(self), -1), dim=1)

    def zeros(self) -> Tensor:
        """How many elements of each piece are zero [B]."""
        return torch.cat([(self.read(c) == 0).flatten(1).sum(1) for c in self.chunks])

    def scale(self, factor_K1: Tensor) -> None:
        """Multiply each piece by the factor of its resblock."""
        factor_B = factor_K1[self.kind.slot_B]
        if isinstance(self._values, list):
            torch._foreach_mul_(self._values, list(factor_B))
        else:
            self._values.mul_(self.spread(factor_B))

    def take(self, rows: slice, factor_K1: Tensor) -> Tensor:
        """These pieces times the factors of their resblocks; to be read only, before a `write`.

        Where a factor is 0 there are zeros, whatever the piece holds.
        """
        factor_B = factor_K1[self.kind.slot_B[rows]]
        # To ask the CPU costs less than to pass over the values; to ask a GPU would be to wait.
        if not factor_B.is_cuda and bool((factor_B == 1).all()):
            return self.read(rows)
        scaled = self.read(rows) * self.spread(factor_B)
        if factor_B.is_cuda or not factor_B.all():
            scaled.masked_fill_(self.spread(factor_B == 0), 0)
        return scaled

    def read(self, rows: slice) -> Tensor:
        """These pieces as one tensor: a view or a copy."""
        if isinstance(self._values, list):
            return torch.stack(self._values[rows])
        return self._values[rows]

    def write(self, rows: slice, values: Tensor) -> None:
        """Replace these pieces."""
        if isinstance(self._values, list):
            torch._foreach_copy_(self._values[rows], list(values))
        elif values.data_ptr() != self._values[rows].data_ptr():
            self._values[rows].copy_(values)

    def write_product(self, rows: slice, left: Tensor, right: Tensor) -> Tensor:
        """Replace these pieces by left @ right; the product, maybe as a view of them."""
        if isinstance(self._values, list):
            product = torch.bmm(left, right)
            self.write(rows, product)
            return product
        values = self._values[rows]
        if values.is_cuda or values.is_contiguous():
            return torch.bmm(left, right, out=values)
        for one in zip(left, right, values, strict=True):  # torch's bmm takes thrice as long
            torch.mm(one[0], one[1], out=one[2])
        return values

    def zero(self, rows: slice) -> None:
        if isinstance(self._values, list):
            torch._foreach_zero_(self._values[rows])
        else:
            self._values[rows].zero_()

    def sound_and_other(self, blocks: frozenset[Block]) -> tuple[list[slice], list[slice]]:
        """(pieces that are in none of these resblocks, pieces that are), as ranges."""
        if blocks.isdisjoint(self.kind.blocks):
            return self.chunks, []
        rows: tuple[list[slice], list[slice]] = [], []
        for at, block in enumerate(self.kind.blocks):
            rows[block in blocks].append(slice(at, at + 1))
        return rows

    def spread(self, values_B: Tensor) -> Tensor:
        """[B] as [B, 1, ...], to be broadcast over the pieces."""
        return values_B.view(-1, *[1] * len(self.kind.shape))


class Batcher:
    """Finds the batches of a step's gradients; how they were found is kept for the next step.

    Args:
        blocks: number of resblocks.
        cut: the pieces that a gradient is cut into; default: the gradient as it is.
        wave: in which such a piece is sent; those of a batch go together.
    """

    def __init__(
        self,
        blocks: int,
        device: torch.device,
        cut: Cut = lambda piece: [piece],
        wave: WaveOf = lambda piece: 0,
    ) -> None:
        self._blocks, self._device, self._cut, self._wave = blocks, device, cut, wave
        self._signature: list[tuple[str, int, torch.Size]] = []
        self._addresses: list[int] | None = None
        self._kinds: list[Kind] = []
        self._strides: list[int | None] = []

    def __call__(self, gradients: Sequence[Piece]) -> list[Batch]:
        """Raises ValueError: a resblock that is not in 0 to `blocks` - 1."""
        signature = [(g.name, g.start, g.values.shape) for g in gradients]
        addresses = [g.values.data_ptr() for g in gradients]
        if signature != self._signature:
            self._kinds, self._signature, self._addresses = self._find(gradients), signature, None
        if addresses != self._addresses:
            self._strides = [_stride(kind, gradients, addresses) for kind in self._kinds]
            self._addresses = addresses
        pairs = zip(self._kinds, self._strides, strict=True)
        return [Batch(kind, _values(kind, stride, gradients)) for kind, stride in pairs]

    def _find(self, gradients: Sequence[Piece]) -> list[Kind]:
        found: dict[tuple[object, int], list[tuple[Piece, int]]] = {}
        for index, gradient in enumerate(gradients):
            for piece in self._cut(gradient):
                part = re.sub(r"\d+", "#", piece.name)
                alike = (part, piece.start, piece.values.shape, piece.block is None)
                found.setdefault((alike, self._wave(piece)), []).append((piece, index))
        return [self._kind(members, wave, gradients) for (_, wave), members in found.items()]

    def _kind(
        self, members: list[tuple[Piece, int]], wave: int, gradients: Sequence[Piece]
    ) -> Kind:
        pieces = [piece for piece, _ in members]
        slots = [self._slot(piece.block) for piece in pieces]
        return Kind(
            keys=tuple(piece.key for piece in pieces),
            names=tuple(piece.name for piece in pieces),
            blocks=tuple(piece.block for piece in pieces),
            shape=pieces[0].values.shape,
            wave=wave,
            slot_B=torch.tensor(slots, device=self._device),
            members=tuple((at, piece.start - gradients[at].start) for piece, at in members),
        )

    def _slot(self, block: Block) -> int:
        if block is None:
            return self._blocks
        if not 0 <= block < self._blocks:
            raise ValueError(f"block: {block} is not in 0 to {self._blocks - 1}")
        return block


def _stride(kind: Kind, gradients: Sequence[Piece], addresses: Sequence[int]) -> int | None:
    """Elements from one piece to the next, where all lie evenly spaced in one buffer."""
    numel, (first, offset) = kind.shape.numel(), kind.members[0]
    places = [addresses[index] // 4 + offset for index, offset in kind.members]
    stride = places[1] - places[0] if len(places) > 1 else numel
    if stride < numel or places != list(range(places[0], places[-1] + 1, stride)):
        return None
    values = gradients[first].values
    end = values.storage_offset() + offset + places[-1] - places[0] + numel
    return stride if 4 * end <= values.untyped_storage().nbytes() else None


def _values(kind: Kind, stride: int | None, gradients: Sequence[Piece]) -> Tensor | list[Tensor]:
    if stride is not None:
        index, offset = kind.members[0]
        first = gradients[index].values
        sizes, inner = (len(kind.keys), *kind.shape), _contiguous(kind.shape)
        return first.as_strided(sizes, (stride, *inner), first.storage_offset() + offset)
    flats = ((gradients[index].values.view(-1), offset) for index, offset in kind.members)
    return [flat[o : o + kind.shape.numel()].view(kind.shape) for flat, o in flats]


def _contiguous(shape: torch.Size) -> Iterator[int]:
    return (math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
