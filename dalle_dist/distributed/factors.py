"""P and Q of one resblock's shards: computed, sent as one vector, received.

Shapes: M short side of a shard, N long side, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.distributed.error_buffer import ErrorBuffer
from dalle_dist.distributed.orthogonal import orthonormal_BMR
from dalle_dist.distributed.wire import launch_mean


class GroupedMean:
    """Several tensors averaged over a group in one go."""

    def __init__(
        self,
        flat: Tensor,
        shapes: Sequence[torch.Size],
        group: dist.ProcessGroup,
        wire: str = "fp32",
        scale: float = 1.0,
    ) -> None:
        self._shapes = shapes
        self._pending = launch_mean(flat, group, wire, scale)

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


class Work:
    """A shard that is compressed, with its error buffer and its Q; and P, once there is one."""

    def __init__(self, values: Tensor, error: ErrorBuffer, q_RN: Tensor) -> None:
        self.values, self.error, self.q_RN = values, error, q_RN
        # The short side is orthogonalised: of an upright shard P Q^T is the transpose.
        self._flipped = values.shape[0] > values.shape[1]
        self.sum_MN = self.p_MR = values

    def take_in(self) -> None:
        total = self.error.take_in(self.values)
        self.sum_MN = total.T if self._flipped else total

    def leave(self, q_RN: Tensor) -> None:
        """Put P Q^T into `values`, and what it misses into the error buffer."""
        left, right = (q_RN.T, self.p_MR.T) if self._flipped else (self.p_MR, q_RN)
        self.error.leave(self.values, left, right)


Launch = Callable[[Tensor, Sequence[torch.Size]], GroupedMean]


def launch_p(works: Sequence[Work], launch: Launch) -> tuple[GroupedMean, list[Tensor]]:
    """P = (gradient + error) Q of each, on its way; and the square norm of this rank's own P."""
    shapes = [torch.Size((min(w.values.shape), w.q_RN.shape[0])) for w in works]
    flat = works[0].values.new_empty(sum(map(math.prod, shapes)))
    parts = split(flat, shapes)
    for work, p_MR in zip(works, parts, strict=True):
        work.take_in()
        torch.mm(work.sum_MN, work.q_RN.T, out=p_MR)
    sizes = [square_norm(p) for p in parts]
    return launch(flat, shapes), sizes


def launch_q(
    works: Sequence[Work], means: Sequence[Tensor], launch: Launch
) -> tuple[GroupedMean, list[Tensor]]:
    """The same for Q' = (gradient + error)^T P, of the P that has arrived."""
    orthogonalise(works, means)
    shapes = [work.q_RN.shape for work in works]
    flat = works[0].values.new_empty(sum(map(math.prod, shapes)))
    parts = split(flat, shapes)
    for work, q_RN in zip(works, parts, strict=True):
        torch.mm(work.p_MR.T, work.sum_MN, out=q_RN)
    sizes = [square_norm(q) for q in parts]
    return launch(flat, shapes), sizes


def orthogonalise(works: Sequence[Work], means: Sequence[Tensor]) -> None:
    """Set every `p_MR`; equal shapes go through QR together."""
    for shape in dict.fromkeys(mean.shape for mean in means):
        alike = [i for i, mean in enumerate(means) if mean.shape == shape]
        bases = orthonormal_BMR(torch.stack([means[i] for i in alike]))
        for i, basis in zip(alike, bases, strict=True):
            works[i].p_MR = basis


def square_norm(values: Tensor) -> Tensor:
    """Sum of squares: of all reductions the cheapest that no infinity and no NaN survives."""
    flat = values.reshape(-1)
    return torch.dot(flat, flat)


def columns_like_gaussian(q_RN: Tensor) -> Tensor:
    """Each row of Q transposed scaled to the norm that a standard normal one would have."""
    norms = torch.linalg.vector_norm(q_RN, dim=1, keepdim=True)
    return q_RN * (math.sqrt(q_RN.shape[1]) / norms.clamp_min(torch.finfo(q_RN.dtype).tiny))
