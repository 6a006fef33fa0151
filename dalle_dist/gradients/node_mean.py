"""The mean of the gradients between nodes, whole or by PowerSGD (paper 2.5 and E.2).

Matrices of resblocks are compressed shard by shard (`powersgd/matrices.py`); what is left of a cut
row, and all that is no matrix of a resblock, is averaged as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.distributed.groups import Groups
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.gradients.batches import Batch
from dalle_dist.gradients.piece import Block, Piece, ReadPieces, name_and_start
from dalle_dist.gradients.powersgd.algorithm import Outcome, PowerSGD
from dalle_dist.gradients.powersgd.matrices import MatrixShards
from dalle_dist.gradients.powersgd.options import PowerSGDOptions
from dalle_dist.gradients.powersgd.rank import check_ranks, pays, table
from dalle_dist.gradients.powersgd.sending import Sending, in_waves
from dalle_dist.gradients.resblocks import Resblocks
from dalle_dist.gradients.scaling import Telemetry
from dalle_dist.gradients.waves import Waves

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
        self._shards, self.waves = MatrixShards(resblocks, cuts), Waves(resblocks.count)
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

    def cut(self, gradient: Piece) -> Iterator[Piece]:
        """What is averaged by itself of a gradient."""
        return self._shards.cut(gradient)

    def wave(self, piece: Piece) -> int:
        """In which wave what `cut` gave is sent."""
        return self.waves.of(piece.block) if piece.values.dim() == 2 else self.waves.last

    def begin(self, batches: Sequence[Batch]) -> Sending:
        """The step's means between nodes, to be sent; a collective call.

        Args:
            batches: of what `cut` gave, by `wave`.
        """
        if self._powersgd.step == 0:
            self._explain(batches)
        compressed = [batch for batch in batches if self._compresses(batch.kind.shape)]
        dense = [batch for batch in batches if not self._compresses(batch.kind.shape)]
        return self._powersgd.begin(in_waves(compressed, dense, self.waves.count))

    def finish(
        self, sent: Sending, nonfinite: frozenset[Block], skip: bool, measure: bool = False
    ) -> Telemetry:
        """Means in place of the gradients, as `PowerSGD.finish` puts them; what was measured."""
        outcome = self._powersgd.finish(sent, nonfinite, skip=skip, measure=measure)
        return self._measured(outcome, sent) if measure and self._rank and not skip else {}

    def _compresses(self, shape: Sequence[int]) -> bool:
        return len(shape) == 2 and pays(tuple(shape), self._rank)

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
        shards = (shard for piece in weights for shard in self.cut(piece))
        compressed = [shard for shard in shards if self._compresses(shard.values.shape)]
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

    def _explain(self, batches: Sequence[Batch]) -> None:
        if self._rank and self._nodes > 1 and self._ranks.rank == 0:
            matrices = [batch.kind for batch in batches if len(batch.kind.shape) == 2]
            shapes = {key: tuple(kind.shape) for kind in matrices for key in kind.keys}
            print(table(shapes, self._rank), flush=True)

    def _measured(self, outcome: Outcome, sent: Sending) -> Telemetry:
        """`compression_error`: ||what is left|| / ||gradient + error|| of each matrix.

        NaN where nothing was compressed: the resblock is not finite, or the step is sent whole.
        """
        index = {name: number for number, name in enumerate(self._shards.shapes)}
        count = len(index)
        left, given = [0.0] * count, [0.0] * count
        kinds = [batch.kind for batch in sent.compressed]
        owned = [(k, n) for kind in kinds for k, n in zip(kind.keys, kind.names, strict=True)]
        for key, name in owned:
            error = outcome.relative_errors.get(key)
            if error is not None and error < 1:
                kept = outcome.square_norms[key]
                given[index[name]] += kept
                left[index[name]] += kept * error**2 / (1 - error**2)
        sums = self._ranks.sum([*left, *given, outcome.sent_bytes, outcome.dense_bytes])
        pairs = zip(sums[:count], sums[count : 2 * count], strict=True)
        errors = [math.sqrt(a / (a + b)) if a + b else math.nan for a, b in pairs]
        return {
            "compression_error": errors,
            "sent_megabytes": sums[-2] / 1e6,
            "dense_megabytes": sums[-1] / 1e6,
        }
