"""The mean of gradient + error as they are, which empties the error buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.gradients.all_reduce import launch_mean
from dalle_dist.gradients.batches import Batch
from dalle_dist.gradients.piece import Block
from dalle_dist.gradients.powersgd.error_feedback import ErrorBuffer
from dalle_dist.gradients.powersgd.state import PowerSGDState


class WholeMean:
    """Sent when made, in fp32 and chunk by chunk: no more than one chunk is held twice.

    Gradients are the means from then on, and error buffers hold gradient + error until `finish`.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        state: PowerSGDState,
        group: dist.ProcessGroup,
        broken_K1: Tensor,
    ) -> None:
        self._group, self._batches = group, batches
        self._errors = [state.of(batch).error for batch in batches]
        for batch, error in zip(batches, self._errors, strict=True):
            error.accumulate(batch, (broken_K1 == 0).float())
            for rows in batch.chunks:
                self._send(batch, error, rows)
        self._norms = [batch.norms() for batch in batches]

    def _send(self, batch: Batch, error: ErrorBuffer, rows: slice) -> None:
        total = error.sum(batch, rows).clone()
        pending = launch_mean(total.view(-1), self._group)
        error.keep(batch, rows)
        batch.write(rows, pending.wait().view(total.shape))

    def flags(self) -> list[Tensor]:
        """Of each batch, which shards' mean is not finite [B]."""
        return [~torch.isfinite(norms) for norms in self._norms]

    def unsound(self) -> Tensor:
        """There are no bases."""
        return torch.zeros(())

    def again(self) -> None:
        """Nothing to repeat."""

    def norms(self) -> list[Tensor]:
        """Of each batch, the norm of every output [B]."""
        return self._norms

    def finish(self, nonfinite: frozenset[Block], skip: bool) -> None:
        """Empty the error buffers, except those of these resblocks or, if `skip`, all.

        There the error buffer keeps the gradient, which comes with the next step.
        """
        for batch, error in zip(self._batches, self._errors, strict=True):
            sound, others = ([], batch.chunks) if skip else batch.sound_and_other(nonfinite)
            for rows in sound:
                error.zero(rows)
            for rows in others:
                batch.zero(rows)
