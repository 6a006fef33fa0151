"""The mean of gradients over replicas as they are: one fp32 all-reduce of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.gradients.all_reduce import launch_mean
from dalle_dist.gradients.batches import Batch
from dalle_dist.gradients.piece import Block


class DenseMean:
    """Launched when made; the gradients change in `finish` alone.

    Args:
        factor_K1: on the gradients of each resblock; K1 as in `finite.py`.
    """

    def __init__(
        self, batches: Sequence[Batch], group: dist.ProcessGroup, factor_K1: Tensor
    ) -> None:
        self.batches = batches
        self._means: list[Tensor] = []
        flat = torch.empty(sum(batch.numel for batch in batches), device=factor_K1.device)
        for batch, values in zip(batches, self._parts(flat), strict=True):
            for rows in batch.chunks:
                values[rows].copy_(batch.take(rows, factor_K1))
        self._pending = launch_mean(flat, group) if batches else None

    def wait(self) -> list[Tensor]:
        """The norm of each mean, a tensor [B] for each batch."""
        if self._pending is None:
            return []
        self._means = self._parts(self._pending.wait())
        return [torch.linalg.vector_norm(mean.flatten(1), dim=1) for mean in self._means]

    def finish(self, nonfinite: frozenset[Block], skip: bool) -> None:
        """The means in place of the gradients; zeros in these resblocks or, if `skip`, in all."""
        for batch, mean in zip(self.batches, self._means, strict=True):
            sound, others = ([], batch.chunks) if skip else batch.sound_and_other(nonfinite)
            for rows in sound:
                batch.write(rows, mean[rows])
            for rows in others:
                batch.zero(rows)

    def _parts(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([batch.numel for batch in self.batches])
        shapes = [(len(batch), *batch.kind.shape) for batch in self.batches]
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
