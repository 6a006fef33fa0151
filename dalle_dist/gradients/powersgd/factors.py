"""P and Q of one resblock's shards: computed, sent as one vector, received.

The number format they travel in is a matter of `gradients/all_reduce.py`.

Shapes: M short side of a shard, N long side, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.gradients.all_reduce import launch_mean
from dalle_dist.gradients.piece import Piece
from dalle_dist.gradients.powersgd.error_feedback import ErrorBuffer
from dalle_dist.gradients.powersgd.orthogonal import orthonormal_BMR


class GroupedMean:
    """Several tensors averaged over a group in one go."""

    def __init__(
        self,
        flat: Tensor,
        shapes: Sequence[torch.Size],
        group: dist.ProcessGroup,
        dtype: str = "fp32",
        scale: float = 1.0,
    ) -> None:
        self._shapes = shapes
        self._pending = launch_mean(flat, group, dtype, scale)

    def advance(self) -> None:
        self._pending.advance()

    def wait(self) -> list[Tensor]:
        return split(self._pending.wait(), self._shapes)


def split(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of `flat`, one after the other."""
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def arrivals(launched: Sequence[GroupedMean]) -> Iterator[list[Tensor]]:
    """Each mean in turn; the next one's second hop is under way while the caller works on it."""
    for number, now in enumerate(launched):
        now.advance()
        for following in launched[number + 1 : number + 2]:
            following.advance()
        yield now.wait()


class Factored:
    """The low-rank approximation P Q^T of one shard + its error; P comes with `orthogonalise`."""

    def __init__(self, shard: Piece, error: ErrorBuffer, q_RN: Tensor) -> None:
        self.shard, self.error, self.q_RN = shard, error, q_RN
        # The short side is orthogonalised: of an upright shard P Q^T is the transpose.
        self._flipped = shard.values.shape[0] > shard.values.shape[1]
        self.sum_MN = self.p_MR = shard.values

    def accumulate(self) -> None:
        total = self.error.accumulate(self.shard.values)
        self.sum_MN = total.T if self._flipped else total

    def subtract_sent(self, q_RN: Tensor) -> None:
        """Put P Q^T into the shard's values, and what it misses into the error buffer."""
        left, right = (q_RN.T, self.p_MR.T) if self._flipped else (self.p_MR, q_RN)
        self.error.subtract_sent(self.shard.values, left, right)


Launch = Callable[[Tensor, Sequence[torch.Size]], GroupedMean]


def launch_p(group: Sequence[Factored], launch: Launch) -> tuple[GroupedMean, list[Tensor]]:
    """P = (gradient + error) Q of each, on its way, and the square norm of this rank's own P."""
    shapes = [torch.Size((min(f.shard.values.shape), f.q_RN.shape[0])) for f in group]
    flat = group[0].shard.values.new_empty(sum(map(math.prod, shapes)))
    parts = split(flat, shapes)
    for factored, p_MR in zip(group, parts, strict=True):
        factored.accumulate()
        torch.mm(factored.sum_MN, factored.q_RN.T, out=p_MR)
    sizes = [square_norm(p) for p in parts]
    return launch(flat, shapes), sizes


def launch_q(
    group: Sequence[Factored], means: Sequence[Tensor], launch: Launch
) -> tuple[GroupedMean, list[Tensor]]:
    """The same for Q' = (gradient + error)^T P, of the P that has arrived."""
    orthogonalise(group, means)
    shapes = [factored.q_RN.shape for factored in group]
    flat = group[0].shard.values.new_empty(sum(map(math.prod, shapes)))
    parts = split(flat, shapes)
    for factored, q_RN in zip(group, parts, strict=True):
        torch.mm(factored.p_MR.T, factored.sum_MN, out=q_RN)
    sizes = [square_norm(q) for q in parts]
    return launch(flat, shapes), sizes


def orthogonalise(group: Sequence[Factored], means: Sequence[Tensor]) -> None:
    """Set every `p_MR`; equal shapes go through QR together."""
    for shape in dict.fromkeys(mean.shape for mean in means):
        alike = [i for i, mean in enumerate(means) if mean.shape == shape]
        bases = orthonormal_BMR(torch.stack([means[i] for i in alike]))
        for i, basis in zip(alike, bases, strict=True):
            group[i].p_MR = basis


def square_norm(values: Tensor) -> Tensor:
    """Sum of squares: of all reductions the cheapest that no infinity and no NaN survives."""
    flat = values.reshape(-1)
    return torch.dot(flat, flat)


def columns_like_gaussian(q_RN: Tensor) -> Tensor:
    """Each row of Q transposed scaled to the norm that a standard normal one would have."""
    norms = torch.linalg.vector_norm(q_RN, dim=1, keepdim=True)
    return q_RN * (math.sqrt(q_RN.shape[1]) / norms.clamp_min(torch.finfo(q_RN.dtype).tiny))
