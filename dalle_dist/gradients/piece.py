"""A named piece of a parameter: what one rank owns of weights, gradients and averages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_dist.errors import CheckpointError

Block = int | None


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of one parameter, flattened, in fp32.

    name    of the parameter
    start   index of the first element in the flattened parameter
    values  flat, or [rows, columns] where they are whole rows of a matrix; mostly a view: what is
            written to it changes the weight or gradient
    block   number of the resblock that the parameter belongs to; None: it is in no resblock
    """

    name: str
    start: int
    values: Tensor
    block: Block = None

    @property
    def key(self) -> str:
        """Tells the pieces of a model apart; also their name in checkpoints."""
        return f"{self.name}@{self.start}"


# Fills flat pieces of a kind with what a checkpoint has of them; whether that was every element.
ReadPieces = Callable[[str, Sequence[Piece]], bool]


def name_and_start(key: str) -> tuple[str, int]:
    """The name of the parameter, and the first element, that a `Piece.key` says.

    Raises CheckpointError: not such a key.
    """
    name, _, start = key.rpartition("@")
    if not (name and start.isdecimal()):
        raise CheckpointError(f"'{key}' is no piece of a parameter")
    return name, int(start)


def share(pieces: Sequence[Piece], index: int, count: int) -> list[Piece]:
    """Views of one of `count` parts of the pieces, about equal in elements, as flat pieces.

    All parts together hold each element once. Every owner of the same pieces cuts them alike.
    """
    total = sum(piece.values.numel() for piece in pieces)
    return list(_between(pieces, total * index // count, total * (index + 1) // count))


def _between(pieces: Sequence[Piece], first: int, last: int) -> Iterator[Piece]:
    at = 0
    for piece in pieces:
        numel = piece.values.numel()
        start, end = max(first - at, 0), min(last - at, numel)
        at += numel
        if start < end:
            values = piece.values.view(-1)[start:end]
            yield Piece(piece.name, piece.start + start, values, piece.block)


def assemble(
    pieces: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Pieces of all ranks, by key, to whole tensors.

    Raises:
        CheckpointError: the pieces do not cover each parameter exactly once.
    """
    parts: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in shapes}
    for key, values in pieces.items():
        name, start = name_and_start(key)
        if name not in parts:
            raise CheckpointError(f"piece '{key}' belongs to no parameter of the model")
        parts[name].append((start, values))
    return {name: _join(name, parts[name], shape) for name, shape in shapes.items()}


def _join(name: str, parts: list[tuple[int, Tensor]], shape: tuple[int, ...]) -> Tensor:
    end = 0
    ordered = sorted(parts, key=lambda part: part[0])
    for start, values in ordered:
        if start != end:
            raise CheckpointError(f"'{name}': elements {end} to {start} are missing or doubled")
        end += values.numel()
    numel = torch.Size(shape).numel()
    if end != numel:
        raise CheckpointError(f"'{name}': pieces hold {end} elements, the model has {numel}")
    return torch.cat([values.reshape(-1) for _, values in ordered]).reshape(shape)
