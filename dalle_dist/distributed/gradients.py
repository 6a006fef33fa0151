"""What a rank owns of the reduced gradient, between the last backward pass and the optimizer.

Private names of DeepSpeed in use: `param._hp_mapping`, `param._index_in_param_group` (ZeRO-1/2,
what its `safe_get_full_grad` rests on), `optimizer.averaged_gradients`, `optimizer.fp16_groups`
(ZeRO-3), `optimizer.bf16_groups`, `fp32_groups_gradients` and `_flat` (bf16 under ZeRO-1). One that
is gone is an error, never a gradient left as it was.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_dist.distributed.versions import TESTED, keeps_whole_gradients
from dalle_dist.optim.ema import Fragment


def owned_gradients(module: nn.Module, optimizer: Any, stage: int, place: int) -> list[Fragment]:
    """fp32 gradients of this rank's pieces, as views: what is written to them, is applied.

    Without ZeRO every rank owns all. Under ZeRO the pieces of the ranks that share the weights
    cover each parameter once; `place` is this rank's number among them.

    Raises:
        RuntimeError: this DeepSpeed keeps its gradients elsewhere.
    """
    named: list[tuple[str, Any]] = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    try:
        if stage == 0:
            return [Fragment(name, 0, p.grad.view(-1)) for name, p in named]
        if stage < 3:
            whole = _whole(optimizer) if keeps_whole_gradients(optimizer) else {}
            owned = [(name, p) for name, p in named if p._hp_mapping is not None]
            return [_zero12(name, p, whole.get(id(p))) for name, p in owned]
        found = {
            id(p): piece
            for number, group in enumerate(optimizer.fp16_groups)
            for p, piece in zip(group, optimizer.averaged_gradients[number], strict=True)
        }
        fragments = [_zero3(name, p, found[id(p)], place) for name, p in named]
        return [fragment for fragment in fragments if fragment is not None]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"DeepSpeed does not keep its gradients where they were ({error!r}); install one that "
            f"dalle-dist is tested with: {', '.join(TESTED)}"
        ) from error


@torch.no_grad()
def put_together(optimizer: Any, owned: list[Fragment], group: dist.ProcessGroup) -> None:
    """Where every rank keeps whole gradients, make them whole again of each rank's `owned` pieces.

    That is bf16 under ZeRO-1, whose norm and clipping look at all of them. `group` shares the
    weights. Costs an all-reduce of the gradient inside the machine.
    """
    if not keeps_whole_gradients(optimizer):
        return
    wholes = optimizer.fp32_groups_gradients_flat
    pieces = [(fragment.values, fragment.values.clone()) for fragment in owned]
    for whole in wholes:
        whole.zero_()
    for values, piece in pieces:
        values.copy_(piece)
    for whole in wholes:
        dist.all_reduce(whole, group=group)


def _whole(optimizer: Any) -> dict[int, Tensor]:
    """By parameter; asked for by `_index_in_param_group`, old DeepSpeeds give another one's."""
    groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
    return {id(p): g for ps, gs in groups for p, g in zip(ps, gs, strict=True)}


def _zero12(name: str, parameter: Any, whole: Tensor | None) -> Fragment:
    mapping = parameter._hp_mapping
    place = mapping.lp_fragment_address
    if whole is not None:
        return Fragment(name, place.start, whole.view(-1).narrow(0, place.start, place.numel))
    values: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
    if values.numel() != place.numel:
        raise AttributeError(f"{name}: {values.numel()} elements instead of {place.numel}")
    return Fragment(name, place.start, values)


def _zero3(name: str, parameter: Any, piece: Tensor, place: int) -> Fragment | None:
    # Every rank holds an equal piece, the last ones filled up beyond the parameter's end.
    start = place * parameter.ds_tensor.ds_numel
    numel = min(piece.numel(), parameter.ds_numel - start)
    return Fragment(name, start, piece.view(-1)[:numel]) if numel > 0 else None
