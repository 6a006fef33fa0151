"""Rows of all ranks as one tensor, through which gradients find their way back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows_BD: Tensor) -> Tensor:
    """The ranks' rows one after another, in rank order: rows_ND. A collective call, as is backward.

    Backward hands each rank the sum of what all ranks found for its rows, so that the ranks' losses
    may be shares of one loss. All ranks have equally many rows. Without a process group, or alone:
    `rows_BD` itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows_BD
    gathered_ND: Tensor = _GatherRows.apply(rows_BD)
    return gathered_ND


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor) -> Tensor:
        ctx.rows = len(rows_BD)
        parts = [torch.empty_like(rows_BD) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows_BD.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed_ND = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed_ND)
        first = dist.get_rank() * ctx.rows
        return summed_ND[first : first + ctx.rows]
