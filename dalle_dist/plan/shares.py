"""What one rank owns of each parameter, and which of it PowerSGD compresses: the code that trains
is asked, with tensors that have no memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dalle_dist.config import Config
from dalle_dist.gradients.piece import Piece
from dalle_dist.gradients.powersgd.matrices import MatrixShards
from dalle_dist.gradients.powersgd.rank import check_ranks, pays, rank_of_shard, saved
from dalle_dist.plan.items import Sharing
from dalle_dist.plan.model import Model


@dataclass(frozen=True)
class Share:
    """What a rank averages with the other nodes.

    compressed  shapes of the shards that go as P and Q of `rank`
    whole       values that go as they are
    """

    compressed: tuple[tuple[int, int], ...]
    whole: int
    rank: int

    @property
    def values(self) -> int:
        """In the shards that are compressed: those of the error buffers."""
        return sum(rows * columns for rows, columns in self.compressed)

    @property
    def p(self) -> int:
        return self.rank * sum(min(shape) for shape in self.compressed)

    @property
    def q(self) -> int:
        return self.rank * sum(max(shape) for shape in self.compressed)

    @property
    def saved(self) -> float:
        """Share of these values that compression leaves out."""
        return saved({str(i): shape for i, shape in enumerate(self.compressed)}, self.rank)


def padded(model: Model, stage: int, ranks: int) -> float:
    """Values of a rank's share of the weights, with what DeepSpeed fills it up with."""
    if stage == 0:
        return model.parameters
    if stage == 3:
        return sum(-(-size // ranks) for size in model.sizes.values())
    return sum(_partition(size, ranks) for size in (model.matrices, model.others))


def largest_share(config: Config, model: Model, sharing: Sharing) -> Share:
    """Of the ranks of a node, the one that sends most. Raises ConfigError: a rank too large."""
    ranks = sharing.shard_world
    of_node, stage = config.parallel.rank_of == "node", config.train.zero_stage
    rank = 0
    if config.parallel.between_nodes == "powersgd":
        rank = rank_of_shard(config.parallel.rank, ranks) if of_node else config.parallel.rank
    cuts = MatrixShards(model.resblocks, ranks if of_node or stage == 3 else 1)
    if rank:
        check_ranks(cuts.shapes, rank)
    shares = (_share(model, stage, ranks, n, cuts, rank) for n in range(ranks))
    return max(shares, key=lambda share: 4 * share.whole + 2 * (share.p + share.q))


def _share(
    model: Model, stage: int, ranks: int, number: int, cuts: MatrixShards, rank: int
) -> Share:
    compressed, whole = [], 0
    for piece in _pieces(model, stage, ranks, number):
        for shard in cuts.cut(piece):
            shape = tuple(shard.values.shape)
            if len(shape) == 2 and pays(shape, rank):
                compressed.append((shape[0], shape[1]))
            else:
                whole += shard.values.numel()
    return Share(tuple(compressed), whole, rank)


def _pieces(model: Model, stage: int, ranks: int, number: int) -> Iterator[Piece]:
    """Under ZeRO-3 an equal part of each parameter, else a run of each group of parameters."""
    if stage == 3:
        for name, size in model.sizes.items():
            part = -(-size // ranks)
            yield from _piece(name, number * part, min(size, (number + 1) * part))
        return
    for decayed in (True, False):
        names = [name for name in model.shapes if (name in model.resblocks.matrices) == decayed]
        part = _partition(sum(model.sizes[name] for name in names), ranks)
        begin, end, at = number * part, (number + 1) * part, 0
        for name in names:
            size = model.sizes[name]
            yield from _piece(name, max(0, begin - at), min(size, end - at))
            at += size


def _piece(name: str, start: int, stop: int) -> Iterator[Piece]:
    if start < stop:
        yield Piece(name, start, _nothing().expand(stop - start))


@functools.cache
def _nothing() -> torch.Tensor:
    return torch.empty(1, device="meta")


def _partition(values: int, ranks: int) -> int:
    """A rank's part of a flat group, which DeepSpeed fills up to a multiple of 2 x ranks."""
    return -(-values // (2 * ranks)) * 2
