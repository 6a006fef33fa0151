"""PowerSGD between nodes: named 2-D shards in, the same shards averaged out (paper 2.5, E.2).

Shapes: M short side of a shard, N long side, R rank.

One step, on replica i of K, for a shard with gradient g_i, error e_i and a fixed Gaussian Q:

    e_i := e_i + g_i                      the error buffer is the gradient buffer
    P    = mean(e_i Q)                    all-reduce of M x R
    P    = orthonormal columns of P
    Q'   = mean(e_i^T P)                  all-reduce of N x R
    D    = P Q'^T                         what every replica takes for the mean gradient
    e_i := e_i - D

All means are over the replicas. Both products are linear, so P and Q' depend on the buffers only
through their mean: D = P P^T mean(e). The last line, averaged, says that the mean error after the
step is the mean error before it, plus mean(g), minus D. Summed over steps from e = 0, the outputs
and the mean error left over add up to the true means: nothing is lost, it only comes later. And a
checkpoint needs only mean(e): replicas that all start from it go on as these would have, however
many they are. (The paper sums where this averages; its e_i - D / K is the same line.)

P is orthonormal, so ||D|| = ||Q'||. All replicas compute D from the same bits; they must be of one
kind of hardware, or their QR may differ in the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.gradients.all_reduce import bytes_per_value, launch_mean
from dalle_dist.gradients.batches import Batch, Batcher
from dalle_dist.gradients.piece import Block, Piece
from dalle_dist.gradients.powersgd.factored import FactoredMean
from dalle_dist.gradients.powersgd.options import PowerSGDOptions
from dalle_dist.gradients.powersgd.sending import Mean, Sending, Wave, in_waves
from dalle_dist.gradients.powersgd.state import PowerSGDState
from dalle_dist.gradients.powersgd.whole import WholeMean
from dalle_dist.gradients.waves import Waves

SKETCH = 8


@dataclass(frozen=True)
class Outcome:
    """What one step did. Equal on all replicas.

    nonfinite        resblocks that are not finite on some rank, before or after sending
    sent_bytes       handed to all-reduces by this rank
    dense_bytes      the same without compression, in the same number formats
    square_norms     of outputs, by Piece.key; only when measured; inf for shards of such resblocks
    relative_errors  by Piece.key, without those of such resblocks; only when measured
    """

    nonfinite: frozenset[Block]
    sent_bytes: int
    dense_bytes: int
    square_norms: dict[str, float]
    relative_errors: dict[str, float]


class PowerSGD:
    """The mean of gradients over a replica group, compressed to rank R, with error feedback.

    Args:
        group: the ranks that hold replicas of this rank's shards.
        blocks: number of resblocks; block indices are below it.
        rank: of each shard; None: the shard's short side, which loses and saves nothing (a check).
        seed: of Q; with a shard's key and shape it determines that shard's Q.
        flag_group: the ranks that agree in `reduce` on what is not finite; all of the world where
            shards of one block lie in several replica groups. Default: `group`.
        device: of the shards.
        compress: False: every step averages gradient + error without compression.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        blocks: int,
        rank: int | None,
        seed: int = 0,
        flag_group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        compress: bool = True,
        options: PowerSGDOptions | None = None,
    ) -> None:
        self._group, self._flag_group = group, flag_group or group
        self._blocks, self._device = blocks, torch.device(device)
        self._options, self._compress = options or PowerSGDOptions(), compress
        self._state = PowerSGDState(group, rank, seed, self._options)
        waves = Waves(blocks)
        self._batchers = (
            Batcher(blocks, self._device, wave=lambda piece: waves.of(piece.block)),
            Batcher(blocks, self._device, wave=lambda piece: waves.last),
        )

    @property
    def step(self) -> int:
        """How often `finish` was called, before and after a resume."""
        return self._state.step

    def reduce(
        self,
        compressed: Sequence[Piece],
        dense: Sequence[Piece] = (),
        *,
        measure: bool = False,
        skip: bool = False,
    ) -> Outcome:
        """A whole step: average all shards over the replica group, in place; a collective call.

        Args:
            compressed: 2-D shards, the same in the same order on all replicas and at each step.
            dense: shards to be averaged as they are.
            skip, measure: as in `finish`.

        Raises:
            ConfigError, CheckpointError: as `begin` does.
        """
        matrices, others = self._batchers[0](compressed), self._batchers[1](dense)
        sending = self.begin(in_waves(matrices, others, Waves(self._blocks).count))
        sending.send_all(torch.ones(self._blocks + 1, device=self._device))
        nonfinite, _ = sending.agree(None, self._flag_group)
        return self.finish(sending, nonfinite, skip=skip, measure=measure)

    def begin(self, waves: Sequence[Wave]) -> Sending:
        """A step whose gradients are sent wave by wave; a collective call.

        Args:
            waves: the same at each step; gradients need not be final before they are sent.

        Raises:
            ConfigError: a rank too large for a shard, or replicas with different shards or Q.
            CheckpointError: a loaded state that does not fit these shards.
        """
        self._state.allocate([batch for wave in waves for batch in wave.compressed])
        return Sending(waves, self._mean, self._group, self._blocks, self._device)

    def _mean(self, batches: Sequence[Batch], factor_K1: Tensor) -> Mean:
        if self._is_uncompressed():
            return WholeMean(batches, self._state, self._group, factor_K1)
        return FactoredMean(batches, self._state, self._options, self._group, factor_K1)

    def finish(
        self, sent: Sending, nonfinite: frozenset[Block], *, skip: bool, measure: bool
    ) -> Outcome:
        """Put the means in place of the gradients, and take from error buffers what was sent.

        In the resblocks of `nonfinite`, the same on all ranks, gradients become zero, and error
        buffers keep what they hold if that is finite, else they become zero too.

        Args:
            skip: the optimizer step will be skipped, so that nothing is taken: the gradients that
                are finite come with the next step (the paper loses them).
            measure: fill what `Outcome` has when measured, for one more small all-reduce.
        """
        sent.finish(nonfinite, skip)
        norms = self._square_norms(sent, nonfinite) if measure else {}
        errors = self._relative_errors(sent, nonfinite, norms) if measure and not skip else {}
        self._state.step += 1
        return Outcome(nonfinite, *self._bytes(sent), norms, errors)

    def errors(self) -> dict[str, Tensor]:
        """This rank's own errors, fp32, by Piece.key; not to be written to."""
        return self._state.errors()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, on the CPU: the mean error of each shard, Q by its seed.

        Every rank of the group calls this; all replicas get the same. Costs what uncompressed
        all-reduces of the gradient cost.
        """
        return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave, on any number of replicas.

        Called before the first step, which sees whether the state fits its shards. The seed is the
        state's.
        """
        self._state.load_state_dict(state)

    def _is_uncompressed(self) -> bool:
        options = self._options
        flush = options.dense_every > 0 and self.step % options.dense_every == 0
        return not self._compress or self.step < options.start_step or flush

    def _square_norms(self, sent: Sending, nonfinite: frozenset[Block]) -> dict[str, float]:
        norms = sent.norms()
        kinds = [batch.kind for batch in (*sent.compressed, *sent.uncompressed)]
        found = torch.cat(norms).double().square().tolist() if norms else []
        owned = [(k, b) for kind in kinds for k, b in zip(kind.keys, kind.blocks, strict=True)]
        return {
            key: math.inf if block in nonfinite else norm
            for (key, block), norm in zip(owned, found, strict=True)
        }

    def _relative_errors(
        self, sent: Sending, nonfinite: frozenset[Block], norms: Mapping[str, float]
    ) -> dict[str, float]:
        """||mean(e) left over|| / ||mean(e) before||, within some 10%.

        The mean of the buffers is known to nobody, but its product with a few random columns is
        cheap to average, and has SKETCH times its square norm in expectation. What was sent is
        orthogonal to what is left, so the squares add up.
        """
        if not sent.compressed:
            return {}
        generator, left = torch.Generator().manual_seed(self.step), []
        for batch in sent.compressed:
            columns = torch.randn(batch.kind.shape[1], SKETCH, generator=generator).to(self._device)
            error = self._state.of(batch).error
            own = torch.stack([error.read(row) @ columns for row in range(len(batch))])
            mean = launch_mean(own.view(-1), self._group).wait().view(own.shape)
            left.append(mean.square().sum((1, 2)) / SKETCH)
        kinds = [batch.kind for batch in sent.compressed]
        owned = [(k, b) for kind in kinds for k, b in zip(kind.keys, kind.blocks, strict=True)]
        totals = {
            key: (part, part + norms[key])
            for (key, block), part in zip(owned, torch.cat(left).tolist(), strict=True)
            if block not in nonfinite
        }
        return {
            key: math.sqrt(part / all_) if all_ else 0.0 for key, (part, all_) in totals.items()
        }

    def _bytes(self, sent: Sending) -> tuple[int, int]:
        width = bytes_per_value(self._options.comm_dtype)
        values = sum(batch.numel for batch in sent.compressed)
        factors = 0
        for batch in sent.compressed:
            rank = self._state.of(batch).q_BRN.shape[1]
            factors += len(batch) * rank * sum(batch.kind.shape)
        rest = 4 * sum(batch.numel for batch in sent.uncompressed)
        plain = any(isinstance(mean, WholeMean) for mean in sent.means)
        return rest + (4 * values if plain else width * factors), rest + width * values
