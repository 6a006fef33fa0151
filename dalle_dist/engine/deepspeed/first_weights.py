"""First weights put where they are trained, of a model on the meta device.

Parameter by parameter: no process ever holds more than one of them whole, and no rank sends its
weights to others, for all draw the same (`transformer/initial.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dalle_dist.transformer.initial import Initial, fill

TOGETHER = 1 << 21  # elements that DeepSpeed shards in one go, unless one parameter has more


def on_meta(model: nn.Module) -> bool:
    return next(model.parameters()).is_meta


def whole_weights(
    model: nn.Module, initials: Mapping[str, Initial], seed: int, device: torch.device
) -> None:
    """Every parameter whole on `device`."""
    for name, parameter in model.named_parameters():
        allocate(parameter, device)
        fill(parameter.data.view(-1), initials[name], seed, name)


def sharded_weights(
    model: nn.Module,
    initials: Mapping[str, Initial],
    seed: int,
    device: torch.device,
    shard_rank: int,
    arguments: Mapping[str, Any],
) -> None:
    """Every parameter as its shard of ZeRO-3; a collective call of those that share the weights.

    Args:
        arguments: of `deepspeed.zero.Init`, but for its module.
    """
    import deepspeed

    for batch in _batches(model):
        for parameter in batch.values():
            allocate(parameter, device)
        deepspeed.zero.Init(module=nn.ParameterList(batch.values()), **arguments)
        for name, parameter in batch.items():
            part: int = parameter.ds_tensor.ds_numel
            start = min(shard_rank * part, parameter.ds_numel)
            end = min(start + part, parameter.ds_numel)
            shard: Tensor = parameter.ds_tensor.data
            shard.zero_()  # beyond the parameter's end too
            fill(shard[: end - start], initials[name], seed, name, start)


def allocate(parameter: nn.Parameter, device: torch.device) -> None:
    """Give a parameter on the meta device memory, without values; the object stays the same."""
    real = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device))
    real.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, real)


def _batches(model: nn.Module) -> Iterator[dict[str, Any]]:
    batch: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if batch and sum(p.numel() for p in batch.values()) + parameter.numel() > TOGETHER:
            yield batch
            batch = {}
        batch[name] = parameter
    yield batch
