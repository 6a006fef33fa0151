"""AdamW as `torch.optim.Optimizer.state_dict` has it: numbers stand for parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dalle_dist.checkpoint.export.partitions import Partition, numbered
from dalle_dist.checkpoint.export.training_state import (
    MOMENTS,
    ExportedState,
    Group,
    param_group,
)
from dalle_dist.engine.interface import WEIGHTS


def flat_optimizer(
    state: ExportedState,
    groups: Sequence[Group],
    numbers: Sequence[Sequence[int]],
    partitions: Sequence[Partition],
) -> dict[str, Any]:
    """Of one whose parameters are flat partitions; `numbers` are of those of each group."""
    moments = [{kind: state.partition(kind, part) for kind in MOMENTS} for part in partitions]
    return _optimizer(state, groups, numbers, moments)


def whole_optimizer(
    state: ExportedState, groups: Sequence[Group], dtype: torch.dtype
) -> dict[str, Any]:
    """Of one whose parameters are the model's: under ZeRO-0.

    Beside a model in bf16 it is DeepSpeed's unfused one, which holds the fp32 weights too.
    """
    names = [list(group.shapes) for group in groups]
    moments = [
        {kind: state.whole(kind, name) for kind in MOMENTS} for found in names for name in found
    ]
    found = _optimizer(state, groups, numbered(names), moments)
    if dtype != torch.bfloat16:
        return found
    masters = [[state.whole(WEIGHTS, name) for name in members] for members in names]
    scale = {"dynamic_loss_scale": False, "cur_scale": 1.0, "cur_iter": 0}
    return {**scale, "optimizer_state_dict": found, "fp32_groups": masters}


def _optimizer(
    state: ExportedState,
    groups: Sequence[Group],
    numbers: Sequence[Sequence[int]],
    moments: Sequence[dict[str, torch.Tensor]],
) -> dict[str, Any]:
    states = {n: {"step": state.step.clone(), **found} for n, found in enumerate(moments)}
    found = [param_group(group, own) for group, own in zip(groups, numbers, strict=True)]
    return {"state": states, "param_groups": found}
