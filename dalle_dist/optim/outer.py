"""DiLoCo's outer optimizer: nodes train apart, and meet every so many steps.

Each node makes steps of its own from common weights, the anchor. What they have moved, `anchor -
weights`, is averaged over the nodes; that mean is the gradient of a step of SGD with Nesterov
momentum on the anchor, which all nodes go on from (arXiv 2311.08105, Algorithm 1).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.gradients.all_reduce import Pending, launch_mean
from dalle_dist.gradients.piece import Piece, ReadPieces

MOMENTUM = "outer_momentum"  # kind of tensors in checkpoints
BUCKET = 2**24  # values that are averaged at a time, while those before are on their way


class OuterSGD:
    """The anchor and the momentum of what one rank owns, fp32; replicas have the same bits.

    Of no use before `restart`.

    Args:
        group: of the ranks that own the same pieces, one on each node.
        every: inner steps from one outer step to the next.
        dtype: communication dtype: "fp32", "bf16", "fp16" or "int8".
    """

    def __init__(
        self, group: dist.ProcessGroup, *, every: int, lr: float, momentum: float, dtype: str
    ) -> None:
        self._group, self._every, self._dtype = group, every, dtype
        self._lr, self._momentum = lr, momentum
        self._inner = 0  # steps since the last outer one
        self._anchors: list[Tensor] = []
        self._momenta: list[Piece] = []
        self._buckets: list[slice] = []

    @property
    def settled(self) -> bool:
        """Whether no inner step was made since all nodes had the same weights."""
        return self._inner == 0

    def count(self) -> bool:
        """Count an inner step; whether an outer step is due."""
        self._inner += 1
        return self._inner >= self._every

    @torch.no_grad()
    def restart(self, weights: Sequence[Piece]) -> None:
        """Take these weights, the same on all replicas, for the anchor, and no momentum."""
        self._inner = 0
        self._anchors = [piece.values.clone() for piece in weights]
        self._momenta = [
            Piece(p.name, p.start, torch.zeros_like(p.values), p.block) for p in weights
        ]
        self._buckets = _buckets([piece.values.numel() for piece in weights])

    @torch.no_grad()
    def step(self, weights: Sequence[Piece]) -> None:
        """Replace the weights, in place, by what all nodes go on from; a collective call.

        Args:
            weights: views of the live ones, the same pieces as at `restart`.
        """
        values = [piece.values for piece in weights]
        sent: deque[tuple[slice, Pending]] = deque()
        for rows in self._buckets:
            moved = torch._foreach_sub(self._anchors[rows], values[rows])
            sent.append((rows, launch_mean(torch.cat(moved), self._group, self._dtype)))
            if len(sent) > 1:
                self._take(*sent.popleft(), values)
        for rows, pending in sent:
            self._take(rows, pending, values)
        self._inner = 0

    def _take(self, rows: slice, pending: Pending, values: list[Tensor]) -> None:
        anchors, momenta = self._anchors[rows], [piece.values for piece in self._momenta[rows]]
        means = list(pending.wait().split([anchor.numel() for anchor in anchors]))
        torch._foreach_mul_(momenta, self._momentum)
        torch._foreach_add_(momenta, means)
        torch._foreach_add_(means, momenta, alpha=self._momentum)
        torch._foreach_add_(anchors, means, alpha=-self._lr)
        torch._foreach_copy_(values[rows], anchors)

    def state(self) -> list[Piece]:
        """The momentum, as views. After an outer step that and the weights are all there is."""
        return list(self._momenta)

    def load_state(self, read: ReadPieces) -> None:
        """Take over the momentum that was saved, by any number of ranks and nodes."""
        read(MOMENTUM, self._momenta)


def _buckets(sizes: Sequence[int]) -> list[slice]:
    """Ranges of pieces with no more than BUCKET values, if they are more than one."""
    found, first, held = [], 0, 0
    for number, size in enumerate(sizes):
        if number > first and held + size > BUCKET:
            found.append(slice(first, number))
            first, held = number, 0
        held += size
    return [*found, slice(first, len(sizes))] if sizes else []
