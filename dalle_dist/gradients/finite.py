"""Which resblocks have something that is not finite, on any rank: one answer for all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.gradients.piece import Block, Piece

# Squares of larger values, summed over 2**31 of them, could overflow fp32.
LARGEST = 2.0**48


def nonfinite_blocks(
    pieces: Sequence[Piece],
    blocks: int,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> frozenset[Block]:
    """Resblocks with a NaN, an infinity or an absolute value above LARGEST; None: outside of them.

    A collective call; the same answer on all ranks of `group` (default: the world).
    """
    broken = torch.zeros(0, dtype=torch.bool, device=device)
    if pieces:
        peaks = torch.stack(torch._foreach_norm([piece.values for piece in pieces], torch.inf))
        broken = ~(peaks.float() <= LARGEST)
    return agree([piece.block for piece in pieces], broken, blocks, device, group)


def agree(
    owners: Sequence[Block],
    broken: Tensor,
    blocks: int,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> frozenset[Block]:
    """The resblocks for which a flag is set on any rank of the group.

    Args:
        owners: the resblock of each flag.
        broken: bool, one flag for each of `owners`.
        blocks: number of resblocks.

    Raises:
        ValueError: a resblock that is not in 0 to `blocks` - 1.
    """
    flags = torch.zeros(blocks + 1, dtype=torch.int32, device=device)
    if owners:
        slots = torch.tensor([_slot(block, blocks) for block in owners], device=device)
        flags.scatter_reduce_(0, slots, broken.int(), "amax")
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    found = flags.nonzero().flatten().tolist()
    return frozenset(None if slot == blocks else slot for slot in found)


def _slot(block: Block, blocks: int) -> int:
    """Outside of all resblocks is the last slot."""
    if block is None:
        return blocks
    if not 0 <= block < blocks:
        raise ValueError(f"block: {block} is not in 0 to {blocks - 1}")
    return block
