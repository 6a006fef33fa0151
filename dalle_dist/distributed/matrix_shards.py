"""Gradients cut into the shards that PowerSGD compresses one by one (paper E.1).

A rank owns pieces of parameters: rows of each matrix under ZeRO-3, and under ZeRO-1 and 2 a long
run of whole matrices with a cut one at each end.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from dalle_dist.distributed.powersgd import Shard
from dalle_dist.optim.ema import Fragment
from dalle_dist.transformer.blocks import block_of, stacked_matrices


class MatrixShards:
    """How the matrices of `model`'s resblocks are cut: by rows, each into `pieces` equal parts.

    Queries, keys and values are three matrices, which the paper compresses one by one.
    """

    def __init__(self, model: nn.Module, pieces: int) -> None:
        self._block, stacked = block_of(model), stacked_matrices(model)
        self.shapes: dict[str, tuple[int, int]] = {}  # of a shard, by the matrix's name
        for name, parameter in model.named_parameters():
            if name in self._block and parameter.ndim == 2:
                rows, columns = parameter.shape
                self.shapes[name] = (-(-rows // (pieces * stacked.get(name, 1))), columns)

    def cut(self, gradient: Fragment) -> Iterator[Shard]:
        """A gradient's shards: whole rows as 2-D views, what is left of a cut row flat."""
        name, start, values = gradient.name, gradient.start, gradient.values
        end, block = start + values.numel(), self._block.get(name)
        rows, columns = self.shapes.get(name, (1, 1))
        first, last = -(-start // columns), end // columns
        if name not in self.shapes or first >= last:
            yield Shard(name, values, block, start)
            return
        if first * columns > start:
            yield Shard(name, values[: first * columns - start], block, start)
        inner = range(first // rows * rows + rows, last, rows)
        for begin, stop in pairwise([first, *inner, last]):
            piece = values[begin * columns - start : stop * columns - start]
            yield Shard(name, piece.view(-1, columns), block, begin * columns)
        if last * columns < end:
            yield Shard(name, values[last * columns - start :], block, last * columns)
