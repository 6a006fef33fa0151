"""The mean of the gradients between machines, whole or by PowerSGD (paper 2.5 and E.2).

A rank owns pieces of parameters: rows of matrices under ZeRO-3, and under ZeRO-1 and 2 a long run
of whole matrices with a cut one at each end. The whole rows of each piece are a shard to compress;
what is left of a cut row, and all that is no matrix of a resblock, is averaged as it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from dalle_dist.config import ParallelConfig
from dalle_dist.distributed.compression import check_rank, ratio, shard_rank, table
from dalle_dist.distributed.groups import Groups
from dalle_dist.distributed.launch import Ranks
from dalle_dist.distributed.powersgd import Outcome, PowerSGD, Shard
from dalle_dist.optim.ema import Fragment
from dalle_dist.transformer.blocks import block_of, resblocks, stacked_matrices

Block = int | None


class Replicas:
    """This rank's pieces and their replicas on the other machines.

    Args:
        rows_cut: each matrix is cut into the machine's ranks (ZeRO-3), not whole on one of them.

    Raises:
        ConfigError: the rank does not compress the pieces of some matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ParallelConfig,
        groups: Groups,
        ranks: Ranks,
        seed: int,
        rows_cut: bool,
    ) -> None:
        self._ranks = ranks
        self._block, self._stacked = block_of(model), stacked_matrices(model)
        self._shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        self.matrices = [n for n, shape in self._shapes.items()
                         if n in self._block and len(shape) == 2]  # fmt: skip
        self._rank = 0
        if config.between_machines == "powersgd":
            of_machine = config.rank_of == "machine"
            self._rank = shard_rank(config.rank, groups.node_size) if of_machine else config.rank
            self._check_rank(groups.node_size if rows_cut else 1)
        self._powersgd = PowerSGD(
            groups.replica,
            blocks=len(resblocks(model)),
            rank=self._rank or None,
            wire=config.wire,
            seed=seed,
            flag_group=dist.group.WORLD,
            device=ranks.device,
            p_scale=config.p_scale,
            q_scale=config.q_scale,
            stored=config.errors,
            warm_start=config.warm_start,
            # A single machine has nothing to compress; errors of a larger run come out whole.
            start_step=config.start_step if groups.machines > 1 else 2**62,
            dense_every=config.dense_every,
        )
        self._compressed: list[Shard] = []
        self.telemetry: dict[str, list[float] | float] = {}

    def reduce(
        self, gradients: list[Fragment], bad: Collection[Block] = (), measure: bool = False
    ) -> frozenset[Block]:
        """Means over the machines, in place; the blocks that are not finite, which are zero.

        Gradients of blocks in `bad` are left out on every machine.
        """
        shards = [shard for gradient in gradients for shard in self._shards(gradient)]
        self._compressed = [shard for shard in shards if self._pays(shard)]
        if self._ranks.rank == 0 and self._rank and self._powersgd.step == 0:
            shapes = {shard.key: tuple(shard.values.shape) for shard in self._compressed}
            print(table(shapes, self._rank), flush=True)
        chosen = {id(shard) for shard in self._compressed}
        dense = [shard for shard in shards if id(shard) not in chosen]
        outcome = self._powersgd.reduce(self._compressed, dense, bad=bad, measure=measure)
        if measure:
            self.telemetry = self._measured(outcome)
        return outcome.bad

    def undo(self) -> None:
        """The update is skipped: what the last `reduce` gave comes with the next."""
        self._powersgd.undo(self._compressed)

    def state(self) -> dict[str, Any]:
        """Mean errors and what else PowerSGD goes on from; every rank calls it."""
        return self._powersgd.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave, on any number of machines."""
        self._powersgd.load(state)

    def _shards(self, gradient: Fragment) -> Iterator[Shard]:
        """A gradient's pieces: whole rows as 2-D views, the rest flat."""
        name, start, values = gradient.name, gradient.start, gradient.values
        block, end = self._block.get(name), gradient.start + gradient.values.numel()
        if not self._rank or name not in self.matrices:
            yield Shard(name, values, block, start)
            return
        columns = self._shapes[name][1]
        first, last = -(-start // columns), end // columns
        if first >= last:  # not one whole row
            yield Shard(name, values, block, start)
            return
        if first * columns > start:
            yield Shard(name, values[: first * columns - start], block, start)
        # Queries, keys and values are three matrices, which the paper compresses one by one.
        parts = math.gcd(self._stacked.get(name, 1), last - first)
        rows = (last - first) // parts
        for row in range(first, last, rows):
            begin = row * columns - start
            piece = values[begin : begin + rows * columns].view(rows, columns)
            yield Shard(name, piece, block, row * columns)
        if last * columns < end:
            yield Shard(name, values[last * columns - start :], block, last * columns)

    def _pays(self, shard: Shard) -> bool:
        if shard.values.ndim != 2 or not self._rank:
            return False
        shape = tuple(shard.values.shape)
        return self._rank < min(shape) and ratio(shape, self._rank) < 1

    def _check_rank(self, pieces: int) -> None:
        """Pieces of the usual size; what a cut leaves over may be smaller, and goes whole."""
        for name in self.matrices:
            rows, columns = self._shapes[name]
            rows //= pieces * self._stacked.get(name, 1)
            check_rank(name, (rows, columns), self._rank)

    def _measured(self, outcome: Outcome) -> dict[str, list[float] | float]:
        """`compression_error`: ||what is left|| / ||gradient + error|| of each of `matrices`."""
        count = len(self.matrices)
        index = {name: number for number, name in enumerate(self.matrices)}
        left, sent = [0.0] * count, [0.0] * count
        for shard in self._compressed:
            error = outcome.relative_errors.get(shard.key)
            if error is not None and error < 1:
                kept = outcome.square_norms[shard.key]
                sent[index[shard.name]] += kept
                left[index[shard.name]] += kept * error**2 / (1 - error**2)
        sums = self._ranks.sum([*left, *sent, outcome.sent_bytes, outcome.dense_bytes])
        pairs = zip(sums[:count], sums[count : 2 * count], strict=True)
        errors = [math.sqrt(a / (a + b)) if a + b else 0.0 for a, b in pairs]
        return {
            "compression_error": errors,
            "sent_megabytes": sums[-2] / 1e6,
            "dense_megabytes": sums[-1] / 1e6,
        }
