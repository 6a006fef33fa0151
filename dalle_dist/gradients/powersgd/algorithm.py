"""PowerSGD between nodes: named 2-D shards in, the same shards averaged out (paper 2.5, E.2).

Shapes: M short side of a shard, N long side, R rank.

One step, on replica i of K, for a shard with gradient g_i, error e_i and a fixed Gaussian Q:

    e_i := e_i + g_i                      the error buffer is the gradient buffer
    P    = mean(e_i Q)                    all-reduce of M x R, one per resblock
    P    = orthonormal columns of P
    Q'   = mean(e_i^T P)                  all-reduce of N x R, one per resblock
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.choices import CommDtype, ErrorDtype, values
from dalle_dist.errors import ConfigError
from dalle_dist.gradients.all_reduce import bytes_per_value
from dalle_dist.gradients.finite import agree
from dalle_dist.gradients.piece import Block, Piece
from dalle_dist.gradients.powersgd.factors import (
    Factored,
    GroupedMean,
    arrivals,
    columns_like_gaussian,
    launch_p,
    launch_q,
    square_norm,
)
from dalle_dist.gradients.powersgd.state import PowerSGDState

SKETCH = 8


@dataclass(frozen=True, kw_only=True)
class PowerSGDOptions:
    """How PowerSGD sends and what it keeps; the keys of the config's section `parallel`.

    comm_dtype   number format of P and Q between nodes
    p_scale, q_scale   what P and Q are multiplied by, to lie well in a 16-bit format. P stays
                 scaled: the 1e-6 of the orthogonalisation is added to the scaled P
    error_dtype  number format of the error buffers
    warm_start   take the last Q', its columns scaled to those of a Gaussian, for the next Q
    start_step   average without compression before this step
    dense_every  at each step that it divides, average gradient + error without compression, which
                 empties the buffers; 0: never

    Raises:
        ConfigError: a value out of its range.
    """

    comm_dtype: CommDtype = "fp32"
    p_scale: float = 1.0
    q_scale: float = 1.0
    error_dtype: ErrorDtype = "fp32"
    warm_start: bool = False
    start_step: int = 0
    dense_every: int = 0

    def __post_init__(self) -> None:
        for name, formats in (
            ("comm_dtype", values(CommDtype)),
            ("error_dtype", values(ErrorDtype)),
        ):
            if getattr(self, name) not in formats:
                raise ConfigError(
                    f"parallel.{name}: '{getattr(self, name)}' is not one of {', '.join(formats)}"
                )
        for name in ("start_step", "dense_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"parallel.{name}: {getattr(self, name)} is negative")


@dataclass(frozen=True)
class Outcome:
    """What one `reduce` did. Equal on all replicas, but for `square_norms` in their last bits.

    nonfinite        resblocks that are not finite on some rank, before or after sending
    square_norms     by Piece.key; inf for shards of such resblocks
    sent_bytes       handed to all-reduces by this rank
    dense_bytes      the same without compression, in the same number formats
    relative_errors  by Piece.key; only when measured
    """

    nonfinite: frozenset[Block]
    square_norms: dict[str, float]
    sent_bytes: int
    dense_bytes: int
    relative_errors: dict[str, float]


class PowerSGD:
    """The mean of gradients over a replica group, compressed to rank R, with error feedback.

    Args:
        group: the ranks that hold replicas of this rank's shards.
        blocks: number of resblocks; block indices are below it.
        rank: of each shard; None: the shard's short side, which loses and saves nothing (a check).
        seed: of Q; with a shard's key and shape it determines that shard's Q.
        flag_group: the ranks that agree on what is not finite; all of the world where shards of
            one block lie in several replica groups. Default: `group`.
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
        self._state = PowerSGDState(
            group, rank, seed, self._options.error_dtype, self._options.warm_start
        )

    @property
    def step(self) -> int:
        """How often `reduce` was called, before and after a resume."""
        return self._state.step

    def reduce(
        self,
        compressed: Sequence[Piece],
        dense: Sequence[Piece] = (),
        *,
        nonfinite: frozenset[Block] = frozenset(),
        measure: bool = False,
    ) -> Outcome:
        """Average all shards over the replica group, in place; every rank of the group calls this.

        The shards of one block travel in one all-reduce of P and one of Q. All of P's are launched
        before the first is waited for, likewise all of Q's, so that they overlap one another and
        the arithmetic; until the end P and Q of all shards are held.

        Gradients of resblocks in `nonfinite` enter no error buffer, their values become zero and
        their norms inf. When what is sent for finite gradients (P or Q, or gradient + error) is not
        finite, so does that resblock, but its buffers hold the gradient already: they are kept if
        they are finite, else zeroed. Other resblocks are not touched by it.

        Args:
            compressed: 2-D shards, the same in the same order on all replicas and at each step.
            dense: shards to be averaged as they are, in one fp32 all-reduce.
            nonfinite: resblocks with gradients that are not finite, the same on all ranks of the
                flag group (`finite.nonfinite_blocks`).
            measure: fill `Outcome.relative_errors`, which costs one more small all-reduce.

        Raises:
            ConfigError: a rank too large for a shard, or replicas with different shards or Q.
            CheckpointError: a loaded state that does not fit these shards.
        """
        self._state.allocate(compressed)
        for shard in dense:
            if shard.block in nonfinite:
                shard.values.zero_()
        whole = self._launch_fp32([shard.values for shard in dense]) if dense else None
        finite = [shard for shard in compressed if shard.block not in nonfinite]
        plain = self._is_uncompressed()
        send = self._send_uncompressed if plain else self._send_factors
        norms, overflowed = send(finite, dense, whole)
        nonfinite |= overflowed
        for shard in [*compressed, *dense]:
            if shard.block in nonfinite:
                shard.values.zero_()
                norms[shard.key] = math.inf
        kept = [shard for shard in finite if shard.block not in nonfinite]
        errors = self._relative_errors(kept, norms) if measure else {}
        self._state.step += 1
        return Outcome(nonfinite, norms, *self._bytes(finite, dense, plain), errors)

    def undo(self, compressed: Iterable[Piece]) -> None:
        """Put what the last `reduce` gave back into the error buffers.

        For a caller that skips the whole update: the gradient comes with the next one instead of
        being lost (the paper loses it). The values must be as `reduce` left them.
        """
        for shard in compressed:
            error = self._state.errors[shard.key]
            error.write(error.read() + shard.values)

    def errors(self) -> dict[str, Tensor]:
        """This rank's own errors, fp32, by Piece.key; not to be written to."""
        return {key: buffer.read() for key, buffer in self._state.errors.items()}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, on the CPU: the mean error of each shard, Q by its seed.

        Every rank of the group calls this; all replicas get the same. Costs what uncompressed
        all-reduces of the gradient cost.
        """
        return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave, on any number of replicas.

        Called before the first `reduce`, which sees whether the state fits its shards. The seed
        is the state's.
        """
        self._state.load_state_dict(state)

    def _is_uncompressed(self) -> bool:
        options = self._options
        flush = options.dense_every > 0 and self.step % options.dense_every == 0
        return not self._compress or self.step < options.start_step or flush

    def _send_factors(
        self, shards: Sequence[Piece], dense: Sequence[Piece], whole: GroupedMean | None
    ) -> tuple[dict[str, float], frozenset[Block]]:
        blocks = _by_block(shards)
        groups = [[self._factored(shard) for shard in block] for block in blocks]
        ps = [launch_p(group, self._launch_p) for group in groups]
        means = arrivals([p for p, _ in ps])
        qs = [launch_q(group, p, self._launch_q) for group, p in zip(groups, means, strict=True)]
        owners = [shard.block for block in blocks for shard in block]
        sizes = [size for _, found in ps + qs for size in found]
        norms = _receive(dense, whole)
        overflowed = self._overflowed(
            owners + owners + [shard.block for shard in dense], sizes + list(norms.values())
        )
        for block, group, q in zip(blocks, groups, arrivals([q for q, _ in qs]), strict=True):
            for shard, factored, q_RN in zip(block, group, q, strict=True):
                if shard.block in overflowed:
                    factored.error.on_overflow(shard.values)
                    continue
                if self._options.q_scale != 1:
                    q_RN.div_(self._options.q_scale)
                factored.subtract_sent(q_RN)
                norms[shard.key] = square_norm(q_RN)
                if self._options.warm_start:
                    self._state.q_by_key[shard.key] = columns_like_gaussian(q_RN)
        return _numbers(norms), overflowed

    def _send_uncompressed(
        self, shards: Sequence[Piece], dense: Sequence[Piece], whole: GroupedMean | None
    ) -> tuple[dict[str, float], frozenset[Block]]:
        """Gradient + error in fp32, block by block: no more than one block is held twice."""
        norms = _receive(dense, whole)
        for block in _by_block(shards):
            errors = [self._state.errors[shard.key] for shard in block]
            sums = [e.accumulate(shard.values) for e, shard in zip(errors, block, strict=True)]
            mean = self._launch_fp32(sums)
            for error, total in zip(errors, sums, strict=True):
                error.on_overflow(total)  # whether it has is not known yet
            norms |= _receive(block, mean)
        owners = {shard.key: shard.block for shard in [*shards, *dense]}
        overflowed = self._overflowed([owners[key] for key in norms], list(norms.values()))
        for shard in shards:
            if shard.block not in overflowed:
                self._state.errors[shard.key].zero()
        return _numbers(norms), overflowed

    def _overflowed(self, owners: Sequence[Block], sizes: Sequence[Tensor]) -> frozenset[Block]:
        """The resblocks for which a size of what was sent is not finite on any rank."""
        values = torch.stack(list(sizes)) if sizes else torch.zeros(0, device=self._device)
        broken = ~torch.isfinite(values)
        return agree(owners, broken, self._blocks, self._device, self._flag_group)

    def _relative_errors(
        self, shards: Sequence[Piece], norms: Mapping[str, float]
    ) -> dict[str, float]:
        """||mean(e) left over|| / ||mean(e) before||, within some 10%.

        The mean of the buffers is known to nobody, but its product with a few random columns is
        cheap to average, and has SKETCH times its square norm in expectation. What was sent is
        orthogonal to what is left, so the squares add up.
        """
        if not shards:
            return {}
        generator = torch.Generator().manual_seed(self.step)
        sketches = []
        for shard in shards:
            columns = torch.randn(shard.values.shape[1], SKETCH, generator=generator)
            sketches.append(self._state.errors[shard.key].read() @ columns.to(self._device))
        left = [s.square().sum() / SKETCH for s in self._launch_fp32(sketches).wait()]
        parts = zip(shards, torch.stack(left).tolist(), strict=True)
        totals = {shard.key: (part, part + norms[shard.key]) for shard, part in parts}
        return {
            key: math.sqrt(part / all_) if all_ else 0.0 for key, (part, all_) in totals.items()
        }

    def _factored(self, shard: Piece) -> Factored:
        return Factored(shard, self._state.errors[shard.key], self._state.q_by_key[shard.key])

    def _launch_p(self, flat: Tensor, shapes: Sequence[torch.Size]) -> GroupedMean:
        return GroupedMean(
            flat, shapes, self._group, self._options.comm_dtype, self._options.p_scale
        )

    def _launch_q(self, flat: Tensor, shapes: Sequence[torch.Size]) -> GroupedMean:
        return GroupedMean(
            flat, shapes, self._group, self._options.comm_dtype, self._options.q_scale
        )

    def _launch_fp32(self, tensors: Sequence[Tensor]) -> GroupedMean:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        return GroupedMean(flat, [tensor.shape for tensor in tensors], self._group)

    def _bytes(
        self, compressed: Sequence[Piece], dense: Sequence[Piece], plain: bool
    ) -> tuple[int, int]:
        width = bytes_per_value(self._options.comm_dtype)
        values = sum(shard.values.numel() for shard in compressed)
        factors = sum(
            self._state.q_by_key[s.key].shape[0] * sum(s.values.shape) for s in compressed
        )
        rest = 4 * sum(shard.values.numel() for shard in dense)
        return rest + (4 * values if plain else width * factors), rest + width * values


def _by_block(shards: Sequence[Piece]) -> list[list[Piece]]:
    blocks: dict[Block, list[Piece]] = {}
    for shard in shards:
        blocks.setdefault(shard.block, []).append(shard)
    return list(blocks.values())


def _receive(shards: Sequence[Piece], mean: GroupedMean | None) -> dict[str, Tensor]:
    """Put the means into the shards; their square norms."""
    for shard, value in zip(shards, mean.wait() if mean else [], strict=True):
        shard.values.copy_(value)
    return {shard.key: square_norm(shard.values) for shard in shards}


def _numbers(norms: Mapping[str, Tensor]) -> dict[str, float]:
    """From the device, all at once."""
    values = torch.stack(list(norms.values())).tolist() if norms else []
    return dict(zip(norms, values, strict=True))
