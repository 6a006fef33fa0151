"""The mean of the gradients between machines, whole or by PowerSGD (paper 2.5 and E.2).

Matrices of resblocks are compressed shard by shard (`matrix_shards`); what is left of a cut row,
and all that is no matrix of a resblock, is averaged as it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from dalle_dist.config import ParallelConfig
from dalle_dist.distributed.compression import check_ranks, pays, shard_rank, table
from dalle_dist.distributed.groups import Groups
from dalle_dist.distributed.launch import Ranks
from dalle_dist.distributed.matrix_shards import MatrixShards
from dalle_dist.distributed.powersgd import Outcome, PowerSGD, Shard
from dalle_dist.optim.ema import Fragment
from dalle_dist.transformer.blocks import resblocks

Block = int | None


class Replicas:
    """This rank's pieces and their replicas on the other machines.

    Args:
        rows_cut: each matrix is cut into the machine's ranks (ZeRO-3), not whole on one of them.
            A rank that is a machine's total is divided among as many shards in both cases.

    Raises:
        ConfigError: the rank is too large for the shards of some matrix, or makes none smaller.
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
        self._ranks, self._machines, self._rank = ranks, groups.machines, 0
        of_machine = config.rank_of == "node"
        self._cuts = MatrixShards(model, groups.local_world_size if rows_cut or of_machine else 1)
        if config.between_nodes == "powersgd":
            self._rank = (
                shard_rank(config.rank, groups.local_world_size) if of_machine else config.rank
            )
            check_ranks(self._cuts.shapes, self._rank)
        self._powersgd = PowerSGD(
            groups.replica,
            blocks=len(resblocks(model)),
            rank=self._rank or None,
            wire=config.comm_dtype,
            seed=seed,
            flag_group=dist.group.WORLD,
            device=ranks.device,
            p_scale=config.p_scale,
            q_scale=config.q_scale,
            stored=config.error_dtype,
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
        shards = [shard for gradient in gradients for shard in self._cuts.cut(gradient)]
        matrices = [shard for shard in shards if shard.values.ndim == 2]
        if self._powersgd.step == 0:
            self._explain(matrices)
        self._compressed = [shard for shard in matrices if pays(shard.values.shape, self._rank)]
        chosen = {id(shard) for shard in self._compressed}
        dense = [shard for shard in shards if id(shard) not in chosen]
        outcome = self._powersgd.reduce(self._compressed, dense, bad=bad, measure=measure)
        if measure and self._rank:
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

    def _explain(self, matrices: Iterable[Shard]) -> None:
        if self._rank and self._machines > 1 and self._ranks.rank == 0:
            shapes = {shard.key: tuple(shard.values.shape) for shard in matrices}
            print(table(shapes, self._rank), flush=True)

    def _measured(self, outcome: Outcome) -> dict[str, list[float] | float]:
        """`compression_error`: ||what is left|| / ||gradient + error|| of each matrix.

        NaN where nothing was compressed: the block is bad, or the update is sent whole.
        """
        index = {name: number for number, name in enumerate(self._cuts.shapes)}
        count = len(index)
        left, sent = [0.0] * count, [0.0] * count
        for shard in self._compressed:
            error = outcome.relative_errors.get(shard.key)
            if error is not None and error < 1:
                kept = outcome.square_norms[shard.key]
                sent[index[shard.name]] += kept
                left[index[shard.name]] += kept * error**2 / (1 - error**2)
        sums = self._ranks.sum([*left, *sent, outcome.sent_bytes, outcome.dense_bytes])
        pairs = zip(sums[:count], sums[count : 2 * count], strict=True)
        errors = [math.sqrt(a / (a + b)) if a + b else math.nan for a, b in pairs]
        return {
            "compression_error": errors,
            "sent_megabytes": sums[-2] / 1e6,
            "dense_megabytes": sums[-1] / 1e6,
        }
