"""Gradients cut into the shards that PowerSGD compresses one by one (paper E.1).

A rank owns pieces of parameters: rows of each matrix under ZeRO-3, and under ZeRO-1 and 2 a long
run of whole matrices with a cut one at each end.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from dalle_dist.gradients.piece import Piece
from dalle_dist.gradients.resblocks import Resblocks


class MatrixShards:
    """How the matrices of resblocks are cut: by rows, each into `cuts` equal shards.

    Queries, keys and values are three matrices, which the paper compresses one by one.
    """

    def __init__(self, resblocks: Resblocks, cuts: int) -> None:
        # Shape of a shard, by the matrix's name.
        self.shapes = {
            name: (-(-rows // (cuts * resblocks.stacked.get(name, 1))), columns)
            for name, (rows, columns) in resblocks.matrices.items()
        }

    def cut(self, gradient: Piece) -> Iterator[Piece]:
        """A gradient's shards: whole rows as 2-D views, what is left of a cut row flat."""
        name, start, values = gradient.name, gradient.start, gradient.values
        end, block = start + values.numel(), gradient.block
        rows, columns = self.shapes.get(name, (1, 1))
        first, last = -(-start // columns), end // columns
        if name not in self.shapes or first >= last:
            yield gradient
            return
        if first * columns > start:
            yield Piece(name, start, values[: first * columns - start], block)
        inner = range(first // rows * rows + rows, last, rows)
        for begin, stop in pairwise([first, *inner, last]):
            piece = values[begin * columns - start : stop * columns - start]
            yield Piece(name, begin * columns, piece.view(-1, columns), block)
        if last * columns < end:
            yield Piece(name, last * columns, values[last * columns - start :], block)
