"""PowerSGD between machines: named 2-D shards in, the same shards averaged out (paper 2.5, E.2).

Knows nothing of DeepSpeed. Shapes: M short side of a shard, N long side, R rank.

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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.distributed.error_buffer import FORMATS as STORED_FORMATS
from dalle_dist.distributed.factors import (
    GroupedMean,
    Work,
    arrivals,
    columns_like_gaussian,
    launch_p,
    launch_q,
    square_norm,
)
from dalle_dist.distributed.replica_state import ReplicaState
from dalle_dist.distributed.wire import FORMATS as WIRE_FORMATS
from dalle_dist.distributed.wire import bytes_per_value, check_format
from dalle_dist.errors import ConfigError

SKETCH = 8
Block = int | None


@dataclass(frozen=True)
class Shard:
    """A gradient that this rank owns; `values` is overwritten with the mean over replicas."""

    name: str  # of the parameter
    values: Tensor  # fp32; [rows, columns] if it is to be compressed, else any shape
    block: Block = None  # resblock; None: outside of them
    start: int = 0  # where it begins in the parameter: tells shards of one name apart

    @property
    def key(self) -> str:
        return f"{self.name}@{self.start}"


@dataclass(frozen=True)
class Outcome:
    """What one `reduce` did. Equal on all replicas, but for `square_norms` in their last bits."""

    bad: frozenset[Block]  # blocks with something not finite, on any rank of the flag group
    square_norms: dict[str, float]  # by Shard.key; inf for shards of bad blocks
    sent_bytes: int  # handed to all-reduces by this rank
    dense_bytes: int  # the same without compression, in the same number formats
    relative_errors: dict[str, float]  # by Shard.key; only when measured

    @property
    def square_norm(self) -> float:
        """Of all shards of this rank; inf when the update is to be skipped (paper E.2, step 10)."""
        return math.inf if self.bad else math.fsum(self.square_norms.values())


class PowerSGD:
    """The mean of gradients over a replica group, compressed to rank R, with error feedback.

    Args:
        group: the ranks that hold replicas of this rank's shards.
        blocks: number of resblocks; block indices are below it.
        rank: of each shard; None: the shard's short side, which loses and saves nothing (a check).
        wire: number format of P and Q between machines, one of `wire.FORMATS`.
        seed: of Q; with a shard's key and shape it determines that shard's Q.
        flag_group: the ranks that call a block bad together; all of the world where shards of one
            block lie in several replica groups. Default: `group`.
        device: of the shards.
        p_scale, q_scale: what P and Q are multiplied by, to lie well in a 16-bit wire format. P
            stays scaled: the 1e-6 of the orthogonalisation is added to the scaled P.
        stored: number format of the error buffers, one of `error_buffer.FORMATS`.
        warm_start: take the last Q', its columns scaled to those of a Gaussian, for the next Q.
        start_step: average without compression before this step.
        dense_every: at each step that it divides, average gradient + error without compression,
            which empties the buffers; 0: never.

    Raises:
        ConfigError: an argument out of its range.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        blocks: int,
        rank: int | None,
        wire: str = "fp32",
        seed: int = 0,
        flag_group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        p_scale: float = 1.0,
        q_scale: float = 1.0,
        stored: str = "fp32",
        warm_start: bool = False,
        start_step: int = 0,
        dense_every: int = 0,
    ) -> None:
        check_format("wire", wire, WIRE_FORMATS)
        check_format("stored", stored, STORED_FORMATS)
        for name, value in (("start_step", start_step), ("dense_every", dense_every)):
            if value < 0:
                raise ConfigError(f"parallel.{name}: {value} is negative")
        self._group, self._flag_group = group, flag_group or group
        self._blocks, self._device, self._wire = blocks, device, wire
        self._p_scale, self._q_scale = p_scale, q_scale
        self._warm_start, self._start_step, self._dense_every = warm_start, start_step, dense_every
        self._held = ReplicaState(group, rank, seed, stored, warm_start)

    @property
    def step(self) -> int:
        """How often `reduce` was called, before and after a resume."""
        return self._held.step

    def reduce(
        self,
        compressed: Sequence[Shard],
        dense: Sequence[Shard] = (),
        *,
        bad: Collection[Block] = (),
        measure: bool = False,
    ) -> Outcome:
        """Average all shards over the replica group, in place; every rank of the group calls this.

        The shards of one block travel in one all-reduce of P and one of Q. All of P's are launched
        before the first is waited for, likewise all of Q's, so that they overlap one another and
        the arithmetic; until the end P and Q of all shards are held.

        A block is bad when a gradient in it is not finite on some rank (nor may its squares
        overflow), or when `bad` names it on some rank. Its gradient then enters no error buffer,
        its values become zero and its norms inf. When what is sent for finite gradients (P or Q, or
        gradient + error) is not finite, the block is as bad, but its buffers hold the gradient
        already: they are kept if they are finite, else zeroed. Other blocks are not touched by it.

        Args:
            compressed: 2-D shards, the same in the same order on all replicas and at each step.
            dense: shards to be averaged as they are, in one fp32 all-reduce.
            bad: blocks that the caller knows to be bad.
            measure: fill `Outcome.relative_errors`, which costs one more small all-reduce.

        Raises:
            ConfigError: a rank too large for a shard, or replicas with different shards or Q.
            CheckpointError: a loaded state that does not fit these shards.
        """
        self._held.meet(compressed)
        shards = [*compressed, *dense]
        sizes = [square_norm(shard.values) for shard in shards]
        whole = self._launch_whole([shard.values for shard in dense]) if dense else None
        broken = self._agree([shard.block for shard in shards], sizes, bad)
        good = [shard for shard in compressed if shard.block not in broken]
        plain = self._is_plain()
        norms, late = (self._send_whole if plain else self._send_factors)(good, dense, whole)
        for shard in shards:
            if shard.block in broken | late:
                shard.values.zero_()
                norms[shard.key] = math.inf
        kept = [shard for shard in good if shard.block not in late]
        errors = self._relative_errors(kept, norms) if measure else {}
        self._held.step += 1
        return Outcome(broken | late, norms, *self._bytes(good, dense, plain), errors)

    def undo(self, compressed: Iterable[Shard]) -> None:
        """Put what the last `reduce` gave back into the error buffers.

        For a caller that skips the whole update: the gradient comes with the next one instead of
        being lost (the paper loses it). The values must be as `reduce` left them.
        """
        for shard in compressed:
            error = self._held.errors[shard.key]
            error.write(error.read() + shard.values)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, on the CPU: the mean error of each shard, Q by its seed.

        Every rank of the group calls this; all replicas get the same. Costs what uncompressed
        all-reduces of the gradient cost.
        """
        return self._held.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave, on any number of replicas; before the first `reduce`.

        The seed is the state's. Whether it fits the shards is seen at the next `reduce`.
        """
        self._held.load(state)

    def _is_plain(self) -> bool:
        flush = self._dense_every > 0 and self.step % self._dense_every == 0
        return self.step < self._start_step or flush

    def _send_factors(
        self, shards: Sequence[Shard], dense: Sequence[Shard], whole: GroupedMean | None
    ) -> tuple[dict[str, float], frozenset[Block]]:
        blocks = _by_block(shards)
        works = [[self._work(shard) for shard in block] for block in blocks]
        ps = [launch_p(group, self._launch_p) for group in works]
        means = arrivals([p for p, _ in ps])
        qs = [launch_q(group, p, self._launch_q) for group, p in zip(works, means, strict=True)]
        owners = [shard.block for block in blocks for shard in block]
        sizes = [size for _, found in ps + qs for size in found]
        norms = _receive(dense, whole)
        late = self._agree(
            owners + owners + [shard.block for shard in dense], sizes + list(norms.values())
        )
        for block, group, q in zip(blocks, works, arrivals([q for q, _ in qs]), strict=True):
            for shard, work, q_RN in zip(block, group, q, strict=True):
                if shard.block in late:
                    work.error.keep(work.values)
                    continue
                if self._q_scale != 1:
                    q_RN.div_(self._q_scale)
                work.leave(q_RN)
                norms[shard.key] = square_norm(q_RN)
                if self._warm_start:
                    self._held.queries[shard.key] = columns_like_gaussian(q_RN)
        return _numbers(norms), late

    def _send_whole(
        self, shards: Sequence[Shard], dense: Sequence[Shard], whole: GroupedMean | None
    ) -> tuple[dict[str, float], frozenset[Block]]:
        """Gradient + error in fp32, block by block: no more than one block is held twice."""
        norms = _receive(dense, whole)
        for block in _by_block(shards):
            errors = [self._held.errors[shard.key] for shard in block]
            sums = [e.take_in(shard.values) for e, shard in zip(errors, block, strict=True)]
            mean = self._launch_whole(sums)
            for error, total in zip(errors, sums, strict=True):
                error.keep(total)  # whether the block is bad is not known yet
            norms |= _receive(block, mean)
        owners = {shard.key: shard.block for shard in [*shards, *dense]}
        late = self._agree([owners[key] for key in norms], list(norms.values()))
        for shard in shards:
            if shard.block not in late:
                self._held.errors[shard.key].clear()
        return _numbers(norms), late

    def _agree(
        self, blocks: Sequence[Block], sizes: Sequence[Tensor], bad: Collection[Block] = ()
    ) -> frozenset[Block]:
        """The blocks in which, on any rank of the flag group, a size is not finite."""
        flags = torch.zeros(self._blocks + 1, dtype=torch.int32, device=self._device)
        flags[[self._slot(block) for block in bad]] = 1
        if sizes:
            slots = torch.tensor([self._slot(block) for block in blocks], device=self._device)
            broken = (~torch.isfinite(torch.stack(list(sizes)))).int()
            flags.scatter_reduce_(0, slots, broken, "amax")
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._flag_group)
        found = flags.nonzero().flatten().tolist()
        return frozenset(None if slot == self._blocks else slot for slot in found)

    def _slot(self, block: Block) -> int:
        if block is None:
            return self._blocks
        if not 0 <= block < self._blocks:
            raise ValueError(f"block: {block} is not in 0 to {self._blocks - 1}")
        return block

    def _relative_errors(
        self, shards: Sequence[Shard], norms: Mapping[str, float]
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
            sketches.append(self._held.errors[shard.key].read() @ columns.to(self._device))
        left = [s.square().sum() / SKETCH for s in self._launch_whole(sketches).wait()]
        parts = zip(shards, torch.stack(left).tolist(), strict=True)
        totals = {shard.key: (part, part + norms[shard.key]) for shard, part in parts}
        return {
            key: math.sqrt(part / all_) if all_ else 0.0 for key, (part, all_) in totals.items()
        }

    def _work(self, shard: Shard) -> Work:
        return Work(shard.values, self._held.errors[shard.key], self._held.queries[shard.key])

    def _launch_p(self, flat: Tensor, shapes: Sequence[torch.Size]) -> GroupedMean:
        return GroupedMean(flat, shapes, self._group, self._wire, self._p_scale)

    def _launch_q(self, flat: Tensor, shapes: Sequence[torch.Size]) -> GroupedMean:
        return GroupedMean(flat, shapes, self._group, self._wire, self._q_scale)

    def _launch_whole(self, tensors: Sequence[Tensor]) -> GroupedMean:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        return GroupedMean(flat, [tensor.shape for tensor in tensors], self._group)

    def _bytes(
        self, compressed: Sequence[Shard], dense: Sequence[Shard], plain: bool
    ) -> tuple[int, int]:
        width = bytes_per_value(self._wire)
        values = sum(shard.values.numel() for shard in compressed)
        factors = sum(self._held.queries[s.key].shape[0] * sum(s.values.shape) for s in compressed)
        rest = 4 * sum(shard.values.numel() for shard in dense)
        return rest + (4 * values if plain else width * factors), rest + width * values


def _by_block(shards: Sequence[Shard]) -> list[list[Shard]]:
    blocks: dict[Block, list[Shard]] = {}
    for shard in shards:
        blocks.setdefault(shard.block, []).append(shard)
    return list(blocks.values())


def _receive(shards: Sequence[Shard], mean: GroupedMean | None) -> dict[str, Tensor]:
    """Put the means into the shards; their square norms."""
    for shard, value in zip(shards, mean.wait() if mean else [], strict=True):
        shard.values.copy_(value)
    return {shard.key: square_norm(shard.values) for shard in shards}


def _numbers(norms: Mapping[str, Tensor]) -> dict[str, float]:
    """From the device, all at once."""
    values = torch.stack(list(norms.values())).tolist() if norms else []
    return dict(zip(norms, values, strict=True))
