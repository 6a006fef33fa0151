"""ZeRO-3's reduce-scatter of large gradients where they lie, without copies.

DeepSpeed copies gradients into a bucket, once more into the order of the ranks, and divides them
there: six times their bytes read or written, before the first is sent. One alone is in that order
already, and NCCL divides on its way. So large ones go one by one, and small ones together as
before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dalle_dist.engine.deepspeed.versions import require

# Values of a gradient, above which a collective of its own costs less than the copies.
LARGE = 2**22


def scatter_large_ones_apart() -> None:
    """Has effect on all engines of this process. Raises RuntimeError: another DeepSpeed."""
    from deepspeed.runtime.zero import stage3

    require(stage3, "zero.stage3", "reduce_scatter_coalesced")
    if not hasattr(stage3.reduce_scatter_coalesced, "apart"):
        stage3.reduce_scatter_coalesced = _apart(stage3.reduce_scatter_coalesced)


def _apart(together: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    def reduce_scatter(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
        world, parts = dist.get_world_size(group), [tensor.contiguous() for tensor in tensors]
        large = {n for n, t in enumerate(tensors) if t.numel() >= LARGE and not t.numel() % world}
        small = [n for n in range(len(tensors)) if n not in large]
        if small:
            reduced = together([parts[n] for n in small], group)
            for number, part in zip(small, reduced, strict=True):
                parts[number] = part
        for number in sorted(large):
            parts[number] = _mean_of_part(parts[number].view(-1), group)
        return parts

    reduce_scatter.apart = True  # type: ignore[attr-defined]
    return reduce_scatter


def _mean_of_part(whole: Tensor, group: Any) -> Tensor:
    """The mean over the ranks of this rank's part, in its place."""
    own = whole.chunk(dist.get_world_size(group))[dist.get_rank(group)]
    op = dist.ReduceOp.AVG
    if dist.get_backend(group) != "nccl":  # no other divides
        whole.div_(dist.get_world_size(group))
        op = dist.ReduceOp.SUM
    dist.reduce_scatter_tensor(own, whole, op=op, group=group)
    return own
