"""ZeRO-3 keeps one copy of fp32 weights and gradients, where DeepSpeed makes more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def keep_one_copy(optimizer: Any) -> None:
    """Of a fresh engine of ZeRO-3.

    It has shards of fp32 weights, and fp32 copies of them to update; it means to have one
    (`stage3.py`), but compares a torch.device with a string. And in each step it copies the
    gradients of a sub-group to a flat tensor, although they lie one after another already, and
    those of each parameter to fp64, for a norm whose last digits change nothing.
    """
    from deepspeed.runtime.zero import stage3

    if hasattr(stage3, "get_norm_dtype"):  # 0.18.9 and before have no such switch
        stage3.get_norm_dtype = lambda: torch.float32
    shards_flat = optimizer.fp16_partitioned_groups_flat
    for shard, master in zip(shards_flat, optimizer.fp32_partitioned_groups_flat, strict=True):
        # Weights on NVMe have no elements in memory.
        alike = shard is not None and shard.numel() == master.numel()
        if alike and (shard.dtype, shard.device) == (master.dtype, master.device):
            master.data = shard.data
    optimizer.flatten = _flatten_views(optimizer.flatten)


def _flatten_views(flatten: Callable[[Sequence[Tensor]], Tensor]) -> Callable[..., Tensor]:
    return lambda tensors: flat_view(tensors) if lie_together(tensors) else flatten(tensors)


def lie_together(tensors: Sequence[Tensor]) -> bool:
    """Whether each begins in memory where the one before it ends."""
    first, at = tensors[0], tensors[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        if (
            tensor.data_ptr() != at
            or tensor.dtype != first.dtype
            or not tensor.is_contiguous()
            or tensor.untyped_storage().data_ptr() != storage
        ):
            return False
        at += tensor.nbytes
    return True


def flat_view(tensors: Sequence[Tensor]) -> Tensor:
    """All of them as one flat tensor, if they `lie_together`."""
    numel = sum(tensor.numel() for tensor in tensors)
    return tensors[0].as_strided((numel,), (1,))
