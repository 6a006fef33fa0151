"""A step's means on their way between nodes, wave by wave (`gradients/waves.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.gradients.batches import Batch
from dalle_dist.gradients.dense import DenseMean
from dalle_dist.gradients.finite import agree, broken_gradients, count_flags
from dalle_dist.gradients.piece import Block
from dalle_dist.gradients.powersgd.factored import FactoredMean
from dalle_dist.gradients.powersgd.whole import WholeMean

Mean = FactoredMean | WholeMean


@dataclass(frozen=True)
class Wave:
    """Batches that are sent together: those that are compressed, and those sent as they are."""

    compressed: Sequence[Batch]
    dense: Sequence[Batch]


def in_waves(compressed: Sequence[Batch], dense: Sequence[Batch], count: int) -> list[Wave]:
    """The batches by their `Kind.wave`, which is below `count`."""
    return [
        Wave([b for b in compressed if b.kind.wave == at], [b for b in dense if b.kind.wave == at])
        for at in range(count)
    ]


class Sending:
    """From the first wave of a step to what is decided about all of them.

    Args:
        mean: starts the mean of a wave's compressed batches, given the factors of resblocks.
        group: the ranks that hold replicas of this rank's pieces.
        blocks: number of resblocks.

    waves       all, in their order
    means       of the compressed batches, for each wave that has been sent
    dense       of the others
    dense_norms for each batch of those, of the mean's pieces, when all have arrived
    broken_K1   of each resblock, how many gradients are not finite on this rank, fp64
    """

    def __init__(
        self,
        waves: Sequence[Wave],
        mean: Callable[[Sequence[Batch], Tensor], Mean],
        group: dist.ProcessGroup,
        blocks: int,
        device: torch.device,
    ) -> None:
        self.waves, self._mean, self._group = waves, mean, group
        self.means: list[Mean] = []
        self.dense: list[DenseMean] = []
        self.dense_norms: list[Tensor] = []
        self.broken_K1 = torch.zeros(blocks + 1, dtype=torch.float64, device=device)
        self._sent = 0

    @property
    def compressed(self) -> list[Batch]:
        """All batches that have been sent compressed, in the order of what is told of each."""
        return [batch for mean in self.means for batch in mean.batches]

    @property
    def uncompressed(self) -> list[Batch]:
        return [batch for wave in self.waves for batch in wave.dense]

    def send_up_to(self, wave: int, factor_K1: Tensor) -> None:
        """Start the waves up to this one, and whatever of earlier ones can go on; a collective.

        Of a resblock that is not finite in a wave, no gradient of the wave enters the error buffers
        of this rank, and zeros stand for those that are averaged as they are.

        Args:
            factor_K1: on the gradients of each resblock.
        """
        while self._sent <= wave:
            self._send(self.waves[self._sent], factor_K1)
            self._sent += 1

    def _send(self, wave: Wave, factor_K1: Tensor) -> None:
        batches = [*wave.compressed, *wave.dense]
        broken_K1 = broken_gradients(batches, len(factor_K1) - 1, factor_K1.device, factor_K1)
        self.broken_K1 += broken_K1
        factor_K1 = factor_K1.masked_fill(broken_K1 != 0, 0)
        earlier = list(self.means)
        if wave.compressed:
            self.means.append(self._mean(wave.compressed, factor_K1))
        if wave.dense:
            self.dense.append(DenseMean(wave.dense, self._group, factor_K1))
        for mean in earlier:
            mean.advance()

    def send_all(self, factor_K1: Tensor) -> None:
        """Start what has not been, and wait until all means are there; a collective call."""
        self.send_up_to(len(self.waves) - 1, factor_K1)
        for mean in self.means:
            mean.advance()
        for mean in self.means:
            mean.receive()
        self.dense_norms = [norms for dense in self.dense for norms in dense.wait()]

    def flags(self) -> Tensor:
        """Of each resblock, how many gradients, P, Q and means are not finite, fp64 [K1]."""
        flags = [flag for mean in self.means for flag in mean.flags()]
        flags += [~torch.isfinite(norms) for norms in self.dense_norms]
        batches, blocks = [*self.compressed, *self.uncompressed], len(self.broken_K1) - 1
        return self.broken_K1 + count_flags(batches, flags, blocks, self.broken_K1.device)

    def agree(
        self, sums: Tensor | None = None, group: dist.ProcessGroup | None = None
    ) -> tuple[frozenset[Block], list[float]]:
        """See `finite.agree`: the same, and where a basis was none, Q' once more before it."""
        counts = [mean.unsound().double().view(1) for mean in self.means]
        unsound = torch.stack(counts).sum(0) if counts else self.broken_K1.new_zeros(1)
        unsound = unsound.to(self.broken_K1.device)
        numbers = unsound if sums is None else torch.cat([unsound, sums])
        nonfinite, (count, *summed) = agree(self.flags(), numbers, group)
        if count:
            for mean in self.means:
                mean.again()
            nonfinite, _ = agree(self.flags(), None, group)
        return nonfinite, summed

    def finish(self, nonfinite: frozenset[Block], skip: bool) -> None:
        """Means in place of the gradients; zeros in these resblocks or, if `skip`, in all."""
        for mean in self.means:
            mean.finish(nonfinite, skip)
        for dense in self.dense:
            dense.finish(nonfinite, skip)

    def norms(self) -> list[Tensor]:
        """Of each batch, compressed ones first, the norm of every output [B]."""
        return [*(norms for mean in self.means for norms in mean.norms()), *self.dense_norms]
