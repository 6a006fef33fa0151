"""The mean by low-rank factors: P and Q' of every batch on their way, and what is made of them.

The equations are those of `algorithm.py`. Shapes: B shards of a batch, M short side of a shard, N
long side, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.gradients.all_reduce import Pending, launch_mean
from dalle_dist.gradients.batches import Batch
from dalle_dist.gradients.piece import Block
from dalle_dist.gradients.powersgd.options import PowerSGDOptions
from dalle_dist.gradients.powersgd.orthogonal import householder_BMR, orthonormal_BMR
from dalle_dist.gradients.powersgd.state import Memory, PowerSGDState


class Factors:
    """Of one batch: P, its basis, Q'.

    own_norms   of this rank's P and Q', [B] each
    """

    def __init__(self, batch: Batch, memory: Memory, narrow: bool) -> None:
        self.batch, self.memory, self._narrow = batch, memory, narrow
        rows, columns = batch.kind.shape
        # The short side is orthogonalised: of an upright shard P Q^T is the transpose.
        self.upright, self.short = rows > columns, min(rows, columns)
        self.own_norms: list[Tensor] = []
        self.mean_BMR = self.basis_BMR = self.sound_B = self.q_BRN = memory.q_BRN  # until known

    def own_p(self) -> Tensor:
        """P = (gradient + error) Q of this rank."""
        q_BRN = self.memory.q_BRN
        p_BMR = q_BRN.new_empty(len(self.batch), self.short, q_BRN.shape[1])
        for rows, sum_BMN in self._sums():
            with self._products():
                torch.bmm(sum_BMN, q_BRN[rows].mT, out=p_BMR[rows])
        self.own_norms = [_norms(p_BMR)]
        return p_BMR

    def own_q(self) -> Tensor:
        """Q' = (gradient + error)^T P of this rank."""
        q_BRN = torch.empty_like(self.memory.q_BRN)
        for rows, sum_BMN in self._sums():
            with self._products():
                torch.bmm(self.basis_BMR[rows].mT, sum_BMN, out=q_BRN[rows])
        self.own_norms[1:] = [_norms(q_BRN)]
        return q_BRN

    def take_p(self, mean_BMR: Tensor) -> None:
        self.mean_BMR = mean_BMR
        self.basis_BMR, self.sound_B = orthonormal_BMR(mean_BMR)

    def _sums(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in self.batch.chunks:
            total = self.memory.error.sum(self.batch, rows)
            yield rows, total.mT if self.upright else total

    def subtract_sent(self, rows: slice) -> None:
        """Put P Q^T into the gradient, and what it misses into the error buffer."""
        p_BMR, q_BRN = self.basis_BMR[rows], self.q_BRN[rows]
        left, right = (q_BRN.mT, p_BMR.mT) if self.upright else (p_BMR, q_BRN)
        with self._products():
            self.memory.error.subtract_sent(self.batch, rows, left, right)

    def _products(self) -> AbstractContextManager[None]:
        return narrow_products() if self._narrow else nullcontext()


class FactoredMean:
    """Sent when made; gradients and error buffers' means change in `finish` alone.

    All of P's are launched before the first is waited for, likewise all of Q's, so that they
    overlap one another and the arithmetic.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        state: PowerSGDState,
        options: PowerSGDOptions,
        group: dist.ProcessGroup,
        broken_K1: Tensor,
    ) -> None:
        self._options, self._group = options, group
        self._refresh = options.refreshes(state.step + 1)
        narrow = options.products == "tf32"
        self.factors = [Factors(batch, state.of(batch), narrow) for batch in batches]
        ps: list[tuple[Pending, torch.Size]] = []
        for factors in self.factors:
            factors.memory.error.accumulate(factors.batch, (broken_K1 == 0).float())
            ps.append(self._launch(factors.own_p(), options.p_scale))
        qs = []
        for factors, mean_BMR in zip(self.factors, _arrivals(ps), strict=True):
            factors.take_p(mean_BMR)
            qs.append(self._launch(factors.own_q(), options.q_scale))
        self._receive_q(self.factors, qs)

    def flags(self) -> list[Tensor]:
        """Of each batch, which shards' P or Q' is not finite on this rank [B]."""
        return [~torch.isfinite(torch.stack(factors.own_norms)).all(0) for factors in self.factors]

    def unsound(self) -> Tensor:
        """How many bases are none, on the device; the same on all replicas."""
        flags = [~factors.sound_B for factors in self.factors]
        return torch.cat(flags).sum() if flags else torch.zeros(())

    def again(self) -> None:
        """Q' once more where a basis was none; every replica that is told of it calls this."""
        redone = [factors for factors in self.factors if not factors.sound_B.all()]
        for factors in redone:
            factors.basis_BMR = householder_BMR(factors.mean_BMR)
            factors.sound_B.fill_(True)
        qs = [self._launch(factors.own_q(), self._options.q_scale) for factors in redone]
        self._receive_q(redone, qs)

    def norms(self) -> list[Tensor]:
        """Of each batch, the norm of every output [B]: P is orthonormal."""
        return [_norms(factors.q_BRN) for factors in self.factors]

    def finish(self, nonfinite: frozenset[Block], skip: bool) -> None:
        """Outputs in place of gradients, except in these resblocks or, if `skip`, in all.

        There the error buffer keeps the gradient, which comes with the next step.
        """
        for factors in self.factors:
            batch = factors.batch
            sound, others = ([], batch.chunks) if skip else batch.sound_and_other(nonfinite)
            for rows in sound:
                factors.subtract_sent(rows)
                if self._refresh:
                    factors.memory.q_BRN[rows] = orthonormal_like_gaussian(factors.q_BRN[rows])
                elif self._options.warm_start:
                    factors.memory.q_BRN[rows] = columns_like_gaussian(factors.q_BRN[rows])
            for rows in others:
                factors.memory.error.keep(batch, rows)
                batch.zero(rows)

    def _launch(self, values: Tensor, scale: float) -> tuple[Pending, torch.Size]:
        pending = launch_mean(values.view(-1), self._group, self._options.comm_dtype, scale)
        return pending, values.shape

    def _receive_q(
        self, factors: Sequence[Factors], launched: Sequence[tuple[Pending, torch.Size]]
    ) -> None:
        for one, q_BRN in zip(factors, _arrivals(launched), strict=True):
            one.q_BRN = q_BRN.div_(self._options.q_scale) if self._options.q_scale != 1 else q_BRN


@contextmanager
def narrow_products() -> Iterator[None]:
    """Within it fp32 products of GPUs that have tensor cores for it round their factors to TF32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def columns_like_gaussian(q_BRN: Tensor) -> Tensor:
    """Each row of Q transposed scaled to the norm that a standard normal one would have."""
    norms = torch.linalg.vector_norm(q_BRN, dim=-1, keepdim=True)
    return q_BRN * (math.sqrt(q_BRN.shape[-1]) / norms.clamp_min(torch.finfo(q_BRN.dtype).tiny))


def orthonormal_like_gaussian(q_BRN: Tensor) -> Tensor:
    """Orthogonal rows that span what those of Q transposed do, at the norm of standard normal ones.

    Waits for the device.
    """
    columns_BNR = q_BRN.mT.contiguous()
    basis_BNR, sound_B = orthonormal_BMR(columns_BNR)
    if not sound_B.all():
        basis_BNR = householder_BMR(columns_BNR)
    return basis_BNR.mT * math.sqrt(q_BRN.shape[-1])


def _arrivals(launched: Sequence[tuple[Pending, torch.Size]]) -> Iterator[Tensor]:
    """Each mean in turn; the next one's second hop is under way while the caller works on it."""
    for number, (now, shape) in enumerate(launched):
        now.advance()
        for following, _ in launched[number + 1 : number + 2]:
            following.advance()
        yield now.wait().view(shape)


def _norms(values: Tensor) -> Tensor:
    """[B]: of all reductions the cheapest that no infinity and no NaN survives."""
    return torch.linalg.vector_norm(values, dim=(1, 2))
