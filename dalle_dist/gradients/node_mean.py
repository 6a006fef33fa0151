"""The mean of the gradients between nodes, whole or by PowerSGD (paper 2.5 and E.2).

Matrices of resblocks are compressed shard by shard (`powersgd/matrices.py`); what is left of a cut
row, and all that is no matrix of a resblock, is averaged as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.distributed.groups import Groups
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.gradients.piece import Block, Piece, ReadPieces, name_and_start
from dalle_dist.gradients.powersgd.algorithm import Outcome, PowerSGD, PowerSGDOptions
from dalle_dist.gradients.powersgd.matrices import MatrixShards
from dalle_dist.gradients.powersgd.rank import check_ranks, pays, table
from dalle_dist.gradients.resblocks import Resblocks
from dalle_dist.gradients.scaling import Telemetry


@dataclass(frozen=True)
class Averaged:
    """What one `NodeMean.average` did.

    nonfinite   resblocks with something not finite, before or after sending
    compressed  the shards that went through PowerSGD
    telemetry   what was measured, else empty
    """

    nonfinite: frozenset[Block]
    compressed: Sequence[Piece]
    telemetry: Telemetry


ERROR, Q = "error", "q"  # kinds of tensors in checkpoints


def _q_name(key: str, shape: Sequence[int]) -> str:
    return f"{key} {'x'.join(map(str, shape))}"


class NodeMean:
    """Averages this rank's pieces with their replicas on the other nodes.

    Args:
        rank: of PowerSGD, for each shard of a matrix; 0: nothing is compressed.
        cuts: into how many row shards each matrix is cut: the ranks of a node where they share it
            (ZeRO-3) or where the rank is quoted for all of them together, else 1.
        seed: of PowerSGD's Gaussian matrices.

    Raises:
        ConfigError: the rank is too large for the shards of some matrix, or makes none smaller.
    """

    def __init__(
        self,
        resblocks: Resblocks,
        groups: Groups,
        ranks: Ranks,
        *,
        rank: int,
        cuts: int,
        seed: int,
        options: PowerSGDOptions,
    ) -> None:
        self._ranks, self._nodes, self._rank = ranks, groups.nodes, rank
        self._shards = MatrixShards(resblocks, cuts)
        if rank:
            check_ranks(self._shards.shapes, rank)
        self._powersgd = PowerSGD(
            groups.replica,
            blocks=resblocks.count,
            rank=rank or None,
            seed=seed,
            flag_group=dist.group.WORLD,
            device=ranks.device,
            options=options,
            # Errors that were left over on several nodes come out whole on a single one.
            compress=groups.nodes > 1,
        )

    def average(
        self, gradients: Sequence[Piece], nonfinite: frozenset[Block], measure: bool = False
    ) -> Averaged:
        """Means over the nodes, in place; a collective call.

        Gradients of the resblocks in `nonfinite`, the same on all ranks, are left out and become
        zero, as are those of resblocks for which something not finite was sent.
        """
        shards, compressed = self._cut(gradients)
        if self._powersgd.step == 0:
            self._explain(shards)
        chosen = {id(shard) for shard in compressed}
        dense = [shard for shard in shards if id(shard) not in chosen]
        outcome = self._powersgd.reduce(compressed, dense, nonfinite=nonfinite, measure=measure)
        measured = self._measured(outcome, compressed) if measure and self._rank else {}
        return Averaged(outcome.nonfinite, compressed, measured)

    def _cut(self, pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
        """(all shards, those that are compressed)."""
        shards = [shard for piece in pieces for shard in self._shards.cut(piece)]
        matrices = (shard for shard in shards if shard.values.ndim == 2)
        return shards, [shard for shard in matrices if pays(shard.values.shape, self._rank)]

    def undo(self, averaged: Averaged) -> None:
        """The step is skipped: what the last `average` gave comes with the next one."""
        self._powersgd.undo(averaged.compressed)

    def errors(self) -> dict[str, Tensor]:
        """What compression has left out so far on this rank, by Piece.key."""
        return self._powersgd.errors()

    def state(self) -> tuple[dict[str, Any], dict[str, list[Piece]]]:
        """(numbers, mean errors and warm Q's as flat pieces by kind); a collective call."""
        state = self._powersgd.state_dict()
        errors = [
            Piece(*name_and_start(key), error.view(-1))
            for key, error in state.pop("errors").items()
        ]
        qs = [
            Piece(_q_name(key, q.shape), 0, q.contiguous().view(-1))
            for key, q in state.pop("q_by_key").items()
        ]
        return state, {ERROR: errors, Q: qs}

    def load_state(
        self, numbers: Mapping[str, Any], weights: Sequence[Piece], read: ReadPieces
    ) -> None:
        """Continue from what `state` gave, on any number of ranks and nodes.

        An error belongs to its element, wherever that lies now. A warm Q belongs to a shard, and is
        a new Gaussian where the shards are others.
        """
        _, compressed = self._cut(weights)
        errors = {shard.key: torch.zeros(shard.values.shape) for shard in compressed}
        read(ERROR, [Piece(s.name, s.start, errors[s.key].view(-1)) for s in compressed])
        qs: dict[str, Tensor] = {}
        for shard in compressed:
            q_RN = torch.empty(self._rank, max(shard.values.shape))
            if read(Q, [Piece(_q_name(shard.key, q_RN.shape), 0, q_RN.view(-1))]):
                qs[shard.key] = q_RN
        unused = numbers["step"] == 0  # saved before the first `average`
        loaded = {"errors": {} if unused else errors, "q_by_key": qs}
        self._powersgd.load_state_dict({**numbers, **loaded})

    def _explain(self, shards: Iterable[Piece]) -> None:
        if self._rank and self._nodes > 1 and self._ranks.rank == 0:
            shapes = {s.key: tuple(s.values.shape) for s in shards if s.values.ndim == 2}
            print(table(shapes, self._rank), flush=True)

    def _measured(self, outcome: Outcome, compressed: Sequence[Piece]) -> Telemetry:
        """`compression_error`: ||what is left|| / ||gradient + error|| of each matrix.

        NaN where nothing was compressed: the resblock is not finite, or the step is sent whole.
        """
        index = {name: number for number, name in enumerate(self._shards.shapes)}
        count = len(index)
        left, sent = [0.0] * count, [0.0] * count
        for shard in compressed:
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
