"""Weights and gradients that a rank owns under DeepSpeed, as pieces of parameters.

They lie in private parts of DeepSpeed (`versions.py`). One that is gone is an error, never a
gradient left as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_dist.engine.deepspeed.nvme import mapped_weights
from dalle_dist.engine.deepspeed.versions import TESTED, keeps_whole_gradients
from dalle_dist.gradients.piece import Piece


def owned_gradients(
    module: nn.Module, optimizer: Any, stage: int, shard_rank: int, blocks: Mapping[str, int]
) -> list[Piece]:
    """fp32 gradients of this rank's pieces, as views: what is written to them is applied.

    Without ZeRO every rank owns all. Under ZeRO the pieces of the ranks that share the weights
    cover each parameter once.

    Args:
        blocks: number of its resblock, by the name of each parameter that is in one.

    Raises:
        RuntimeError: this DeepSpeed keeps its gradients elsewhere.
    """
    named: list[tuple[str, Any]] = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    try:
        found = _gradients(named, optimizer, stage, shard_rank)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"DeepSpeed does not keep its gradients where they were ({error!r}); install one that "
            f"dalle-dist is tested with: {', '.join(TESTED)}"
        ) from error
    return [Piece(name, start, values, blocks.get(name)) for name, start, values in found]


def owned_weights(
    module: nn.Module, optimizer: Any, stage: int, shard_rank: int, blocks: Mapping[str, int]
) -> list[Piece]:
    """fp32 (master) weights of this rank's pieces, as views of the live ones.

    Without ZeRO every rank owns all; of a parameter that is not contiguous, they are a copy.
    """
    found: Found = []
    if stage == 0:
        found = [(name, 0, p.data.reshape(-1)) for name, p in optimized(module, optimizer)]
    files = mapped_weights(optimizer) if stage == 3 else {}
    for name, parameter in module.named_parameters() if stage > 0 else ():
        if stage == 3:
            part = _zero3_weight(parameter, optimizer, files, shard_rank)
        else:
            part = _zero12_weight(parameter)
        if part is not None:
            found.append((name, *part))
    return [Piece(name, start, values.detach(), blocks.get(name)) for name, start, values in found]


@torch.no_grad()
def share_whole_gradients(optimizer: Any, owned: list[Piece], group: dist.ProcessGroup) -> None:
    """Where every rank keeps whole gradients, make them whole again of each rank's `owned` pieces.

    That is bf16 under ZeRO-1, whose norm and clipping look at all of them. `group` shares the
    weights. Costs an all-reduce of the gradient inside the node.
    """
    if not keeps_whole_gradients(optimizer):
        return
    wholes = optimizer.fp32_groups_gradients_flat
    pieces = [(piece.values, piece.values.clone()) for piece in owned]
    for whole in wholes:
        whole.zero_()
    for values, copy in pieces:
        values.copy_(copy)
    for whole in wholes:
        dist.all_reduce(whole, group=group)


def clear_whole_gradients(optimizer: Any) -> None:
    """Zero where every rank keeps gradients of what others own too."""
    if keeps_whole_gradients(optimizer):
        for whole in optimizer.fp32_groups_gradients_flat:
            whole.zero_()


Found = list[tuple[str, int, Tensor]]


def _gradients(named: list[tuple[str, Any]], optimizer: Any, stage: int, shard_rank: int) -> Found:
    if stage == 0:
        return [(name, 0, p.grad.view(-1)) for name, p in named]
    if stage < 3:
        whole = _whole_gradients(optimizer) if keeps_whole_gradients(optimizer) else {}
        owned = [(name, p) for name, p in named if p._hp_mapping is not None]
        return [(name, *_zero12_gradient(name, p, whole.get(id(p)))) for name, p in owned]
    pieces = _offloaded(optimizer) if optimizer.offload_optimizer else _on_device(optimizer)
    parts = [(name, _zero3_part(p, pieces[id(p)], shard_rank)) for name, p in named]
    return [(name, *part) for name, part in parts if part is not None]


def _on_device(optimizer: Any) -> dict[int, Tensor]:
    """ZeRO-3's pieces of gradients, by parameter."""
    return {
        id(p): piece
        for number, group in enumerate(optimizer.fp16_groups)
        for p, piece in zip(group, optimizer.averaged_gradients[number], strict=True)
    }


def _offloaded(optimizer: Any) -> dict[int, Tensor]:
    """The same where the optimizer's state is in main memory: in flat gradients of groups there."""
    found = {}
    for p in (p for group in optimizer.fp16_groups for p in group):
        group, start, numel = optimizer.grad_position[p.ds_id]
        found[id(p)] = optimizer.fp32_partitioned_groups_flat[group].grad.narrow(0, start, numel)
    return found


def _whole_gradients(optimizer: Any) -> dict[int, Tensor]:
    """By parameter; asked for by `_index_in_param_group`, old DeepSpeeds give another one's."""
    groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
    return {id(p): g for ps, gs in groups for p, g in zip(ps, gs, strict=True)}


def _zero12_gradient(name: str, parameter: Any, whole: Tensor | None) -> tuple[int, Tensor]:
    mapping = parameter._hp_mapping
    address = mapping.lp_fragment_address
    if whole is not None:
        return address.start, whole.view(-1).narrow(0, address.start, address.numel)
    values: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
    if values.numel() != address.numel:
        raise AttributeError(f"{name}: {values.numel()} elements instead of {address.numel}")
    return address.start, values


def optimized(module: nn.Module, optimizer: Any) -> list[tuple[str, Tensor]]:
    """Without ZeRO: by the name of each parameter, the fp32 tensor that the optimizer updates."""
    named = list(module.named_parameters())
    if isinstance(optimizer, torch.optim.Optimizer):  # fp32: no wrapper around ours
        return [(name, p) for name, p in named]
    lows = [p for group in optimizer.fp16_groups for p in group]
    highs = [p for group in optimizer.fp32_groups for p in group]
    by_id = {id(low): high for low, high in zip(lows, highs, strict=True)}
    return [(name, by_id[id(p)]) for name, p in named]


def _zero12_weight(parameter: Any) -> tuple[int, Tensor] | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment().view(-1)


def _zero3_weight(
    parameter: Any, optimizer: Any, files: Mapping[int, Tensor], shard_rank: int
) -> tuple[int, Tensor] | None:
    from deepspeed.utils import safe_get_local_fp32_param

    if files:
        number, offset, numel = optimizer.grad_position[parameter.ds_id]
        if number in files:
            return _zero3_part(parameter, files[number].narrow(0, offset, numel), shard_rank)
    return _zero3_part(parameter, safe_get_local_fp32_param(parameter), shard_rank)


def _zero3_part(parameter: Any, piece: Tensor, shard_rank: int) -> tuple[int, Tensor] | None:
    # Every rank holds an equal piece, the last ones padded beyond the parameter's end.
    start = shard_rank * parameter.ds_tensor.ds_numel
    numel = min(piece.numel(), parameter.ds_numel - start)
    return (start, piece.view(-1)[:numel]) if numel > 0 else None
