"""Which resblocks have something that is not finite, on any rank: one answer for all ranks.

Shape suffix: K1 resblocks and, as the last, what is in none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.gradients.batches import Batch
from dalle_dist.gradients.piece import Block

# Norm of a gradient; with larger ones squares of sums and products of them could overflow fp32.
LARGEST = 2.0**48


def broken_gradients(
    batches: Sequence[Batch], blocks: int, device: torch.device, factor_K1: Tensor | None = None
) -> Tensor:
    """Of each resblock, how many pieces have a NaN, an infinity or a norm above LARGEST [K1].

    On this rank alone and on its device, in fp64. With factors, of the pieces times those of their
    resblocks.
    """
    norms = [batch.norms() for batch in batches]
    if factor_K1 is not None:
        pairs = zip(norms, batches, strict=True)
        norms = [norms_B * factor_K1[batch.kind.slot_B] for norms_B, batch in pairs]
    return count_flags(batches, [~(norms_B <= LARGEST) for norms_B in norms], blocks, device)


def count_flags(
    batches: Sequence[Batch], flags: Sequence[Tensor], blocks: int, device: torch.device
) -> Tensor:
    """How many flags are set in each resblock, fp64 [K1]; `flags` has one [B] for each batch."""
    counts_K1 = torch.zeros(blocks + 1, dtype=torch.float64, device=device)
    if batches:
        slots = torch.cat([batch.kind.slot_B for batch in batches])
        counts_K1.index_add_(0, slots, torch.cat(list(flags)).double())
    return counts_K1


def agree(
    flags_K1: Tensor, sums: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> tuple[frozenset[Block], list[float]]:
    """(resblocks with a flag on any rank, `sums` summed over the ranks); None: outside of them.

    One all-reduce over `group` (default: the world), and one copy to the host.

    Args:
        flags_K1: counts; both are fp64, on the device.
    """
    numbers = flags_K1 if sums is None else torch.cat([flags_K1, sums])
    dist.all_reduce(numbers, group=group)
    found, blocks = numbers.tolist(), len(flags_K1) - 1
    slots = (slot for slot, count in enumerate(found[: blocks + 1]) if count)
    nonfinite = frozenset(None if slot == blocks else slot for slot in slots)
    return nonfinite, found[blocks + 1 :]
