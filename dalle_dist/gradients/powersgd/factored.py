"""The mean by low-rank factors: P and Q' of a wave on their way, and what is made of them.

Shapes as in `factors.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.gradients.all_reduce import Pending, launch_mean
from dalle_dist.gradients.batches import Batch
from dalle_dist.gradients.piece import Block
from dalle_dist.gradients.powersgd.factors import Factors, Part, by_shape
from dalle_dist.gradients.powersgd.options import PowerSGDOptions
from dalle_dist.gradients.powersgd.orthogonal import householder_BMR, orthonormal_BMR
from dalle_dist.gradients.powersgd.state import PowerSGDState


class FactoredMean:
    """Sent when made; gradients and error buffers' means change in `finish` alone.

    P goes at once, Q' when `advance` is first called: between the two other waves can be made, so
    that the wire and the arithmetic overlap.

    batches   in the order of what is told of each
    factors   by shape
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        state: PowerSGDState,
        options: PowerSGDOptions,
        group: dist.ProcessGroup,
        factor_K1: Tensor,
    ) -> None:
        self._options, self._group, self._device = options, group, factor_K1.device
        self._refresh = options.refreshes(state.step + 1)
        self.factors = by_shape(batches, state, narrow=options.products == "tf32")
        self.batches = [part.batch for factors in self.factors for part in factors.parts]
        for batch in batches:
            state.of(batch).error.accumulate(batch, factor_K1)
        flat, ps = self._flat([factors.p_shape for factors in self.factors])
        for factors, p in zip(self.factors, ps, strict=True):
            factors.own_p(p)
        self._p: Pending | None = self._launch(flat, options.p_scale)
        self._q: Pending | None = None

    def advance(self) -> None:
        """As soon as P has arrived, launch Q'; a collective call if it is the first."""
        if self._p is not None:
            mean, self._p = self._p.wait(), None
            sizes = [factors.p_shape.numel() for factors in self.factors]
            for factors, p in zip(self.factors, mean.split(sizes), strict=True):
                factors.take_p(p)
            self._q = self._send_q(self.factors)
        elif self._q is not None:
            self._q.advance()

    def receive(self) -> None:
        """Wait for Q'."""
        if self._p is not None:
            self.advance()
        if self._q is not None:
            self._receive_q(self.factors, self._q)
            self._q = None

    def flags(self) -> list[Tensor]:
        """Of each batch, which shards' P or Q' is not finite on this rank [B]."""
        return [flags for factors in self.factors for flags in factors.flags()]

    def unsound(self) -> Tensor:
        """How many bases are none, on the device; the same on all replicas."""
        return torch.cat([~factors.sound_B for factors in self.factors]).sum()

    def again(self) -> None:
        """Q' once more where a basis was none; every replica that is told of it calls this."""
        redone = [factors for factors in self.factors if not factors.sound_B.all()]
        for factors in redone:
            factors.use_householder()
        if redone:
            self._receive_q(redone, self._send_q(redone))

    def norms(self) -> list[Tensor]:
        """Of each batch, the norm of every output [B]."""
        return [norms for factors in self.factors for norms in factors.norms()]

    def finish(self, nonfinite: frozenset[Block], skip: bool) -> None:
        """Outputs in place of gradients, except in these resblocks or, if `skip`, in all.

        There the error buffer keeps the gradient, which comes with the next step.
        """
        for factors in self.factors:
            for part in factors.parts:
                batch = part.batch
                sound, others = ([], batch.chunks) if skip else batch.sound_and_other(nonfinite)
                for rows in sound:
                    factors.subtract_sent(part, rows)
                    self._renew_q(factors, part, rows)
                for rows in others:
                    part.memory.error.keep(batch, rows)
                    batch.zero(rows)

    def _renew_q(self, factors: Factors, part: Part, rows: slice) -> None:
        if self._refresh:
            found_BRN = factors.q_BRN[part.among(rows)]
            part.memory.q_BRN[rows] = orthonormal_like_gaussian(found_BRN)
        elif self._options.warm_start:
            part.memory.q_BRN[rows] = columns_like_gaussian(factors.q_BRN[part.among(rows)])

    def _send_q(self, factors: Sequence[Factors]) -> Pending:
        flat, qs = self._flat([one.q_shape for one in factors])
        for one, q in zip(factors, qs, strict=True):
            one.own_q(q)
        return self._launch(flat, self._options.q_scale)

    def _receive_q(self, factors: Sequence[Factors], pending: Pending) -> None:
        mean = pending.wait()
        if self._options.q_scale != 1:
            mean.div_(self._options.q_scale)
        sizes = [one.q_shape.numel() for one in factors]
        for one, q in zip(factors, mean.split(sizes), strict=True):
            one.take_q(q)

    def _flat(self, shapes: Sequence[torch.Size]) -> tuple[Tensor, Sequence[Tensor]]:
        """A buffer for all of them, and the part of each."""
        sizes = [shape.numel() for shape in shapes]
        flat = torch.empty(sum(sizes), device=self._device)
        return flat, flat.split(sizes)

    def _launch(self, flat: Tensor, scale: float) -> Pending:
        return launch_mean(flat, self._group, self._options.comm_dtype, scale)


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
