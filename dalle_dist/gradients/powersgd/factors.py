"""P, its basis and Q' of all shards of one shape that are sent together, whatever their batches.

The equations are those of `algorithm.py`. Shapes: B shards, M their short side, N the long one, R
rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_dist.gradients.batches import Batch
from dalle_dist.gradients.powersgd.orthogonal import householder_BMR, orthonormal_BMR
from dalle_dist.gradients.powersgd.state import Memory, PowerSGDState


@dataclass(frozen=True)
class Part:
    """A batch, and which of the B shards are its own."""

    batch: Batch
    memory: Memory
    first: int

    @property
    def shards(self) -> slice:
        return slice(self.first, self.first + len(self.batch))

    def among(self, rows: slice) -> slice:
        """Where these rows of the batch are among the B."""
        return slice(self.first + rows.start, self.first + rows.stop)


class Factors:
    """Of one shape.

    own_norms   of this rank's P and Q', [B] each
    """

    def __init__(self, shape: torch.Size, parts: Sequence[Part], narrow: bool) -> None:
        rows, columns = shape
        # The short side is orthogonalised: of an upright shard P Q^T is the transpose.
        self.upright, self.parts, self._narrow = rows > columns, parts, narrow
        size, rank = parts[-1].shards.stop, parts[0].memory.q_BRN.shape[1]
        self.p_shape = torch.Size((size, min(rows, columns), rank))
        self.q_shape = torch.Size((size, rank, max(rows, columns)))
        self.own_norms: list[Tensor] = []
        self.mean_BMR = self.basis_BMR = self.sound_B = self.q_BRN = torch.empty(0)  # until known

    def own_p(self, flat: Tensor) -> None:
        """P = (gradient + error) Q of this rank, to `flat`."""
        p_BMR = flat.view(self.p_shape)
        for part, rows, sum_BMN in self._sums():
            with self._products():
                q_BNR = part.memory.q_BRN[rows].mT
                torch.bmm(sum_BMN, q_BNR, out=p_BMR[part.among(rows)])
        self.own_norms = [_norms(p_BMR)]

    def own_q(self, flat: Tensor) -> None:
        """Q' = (gradient + error)^T P of this rank, to `flat`."""
        q_BRN = flat.view(self.q_shape)
        for part, rows, sum_BMN in self._sums():
            among = part.among(rows)
            with self._products():
                torch.bmm(self.basis_BMR[among].mT, sum_BMN, out=q_BRN[among])
        self.own_norms[1:] = [_norms(q_BRN)]

    def take_p(self, flat: Tensor) -> None:
        """The mean of P has arrived."""
        self.mean_BMR = flat.view(self.p_shape)
        self.basis_BMR, self.sound_B = orthonormal_BMR(self.mean_BMR)

    def use_householder(self) -> None:
        """A basis for all, where there was none for some."""
        self.basis_BMR = householder_BMR(self.mean_BMR)
        self.sound_B.fill_(True)

    def take_q(self, flat: Tensor) -> None:
        """The mean of Q' has arrived."""
        self.q_BRN = flat.view(self.q_shape)

    def subtract_sent(self, part: Part, rows: slice) -> None:
        """Put P Q^T into the gradient, and what it misses into the error buffer."""
        p_BMR, q_BRN = self.basis_BMR[part.among(rows)], self.q_BRN[part.among(rows)]
        left, right = (q_BRN.mT, p_BMR.mT) if self.upright else (p_BMR, q_BRN)
        with self._products():
            part.memory.error.subtract_sent(part.batch, rows, left, right)

    def norms(self) -> list[Tensor]:
        """Of each batch, the norm of every output: P is orthonormal."""
        norms_B = _norms(self.q_BRN)
        return [norms_B[part.shards] for part in self.parts]

    def flags(self) -> list[Tensor]:
        """Of each batch, which shards' P or Q' is not finite on this rank."""
        flags_B = ~torch.isfinite(self.own_norms[0] + self.own_norms[1])
        return [flags_B[part.shards] for part in self.parts]

    def _sums(self) -> Iterator[tuple[Part, slice, Tensor]]:
        for part in self.parts:
            for rows in part.batch.chunks:
                total = part.memory.error.sum(part.batch, rows)
                yield part, rows, total.mT if self.upright else total

    def _products(self) -> AbstractContextManager[None]:
        return narrow_products() if self._narrow else nullcontext()


def by_shape(batches: Sequence[Batch], state: PowerSGDState, narrow: bool) -> list[Factors]:
    """The factors of these batches, whose order they keep."""
    found: dict[torch.Size, list[Part]] = {}
    for batch in batches:
        parts = found.setdefault(batch.kind.shape, [])
        first = parts[-1].shards.stop if parts else 0
        parts.append(Part(batch, state.of(batch), first))
    return [Factors(shape, parts, narrow) for shape, parts in found.items()]


@contextmanager
def narrow_products() -> Iterator[None]:
    """Within it fp32 products of GPUs that have tensor cores for it round their factors to TF32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _norms(values: Tensor) -> Tensor:
    """[B]: of all reductions the cheapest that no infinity and no NaN survives."""
    return torch.linalg.vector_norm(values, dim=(1, 2))
