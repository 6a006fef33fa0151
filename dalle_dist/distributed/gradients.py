"""What a rank owns of the reduced gradient, between the last backward pass and the optimizer.

Private names of DeepSpeed in use: `param._hp_mapping`, `param._index_in_param_group` (ZeRO-1/2,
what its `safe_get_full_grad` rests on), `optimizer.averaged_gradients`, `optimizer.fp16_groups`
(ZeRO-3). One that is gone is an error, never a gradient left as it was.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
            owned = [(name, p) for name, p in named if p._hp_mapping is not None]
            return [_zero12(name, parameter) for name, parameter in owned]
        found: dict[int, Tensor] = {}
        for number, group in enumerate(optimizer.fp16_groups):
            pieces = optimizer.averaged_gradients[number]
            found |= {id(p): piece for p, piece in zip(group, pieces, strict=True)}
        fragments = [_zero3(name, p, found[id(p)], place) for name, p in named]
        return [fragment for fragment in fragments if fragment is not None]
    except (AttributeError, KeyError, TypeError) as error:
        raise RuntimeError(
            f"DeepSpeed: its gradients are not where 0.19.8 keeps them ({error!r}); this version "
            "of dalle-dist does not know that one"
        ) from error


@torch.no_grad()
def put_together(optimizer: Any, owned: list[Fragment], group: dist.ProcessGroup) -> None:
    """Where every rank keeps whole gradients, make them whole again of each rank's `owned` pieces.

    That is bf16 under ZeRO-1, whose norm and clipping look at all of them. `group` shares the
    weights. Costs an all-reduce of the gradient inside the machine.
    """
    wholes = getattr(optimizer, "fp32_groups_gradients_flat", None)
    if wholes is None:
        return
    pieces = [(fragment.values, fragment.values.clone()) for fragment in owned]
    for whole in wholes:
        whole.zero_()
    for values, piece in pieces:
        values.copy_(piece)
    for whole in wholes:
        dist.all_reduce(whole, group=group)


def _zero12(name: str, parameter: Any) -> Fragment:
    mapping = parameter._hp_mapping
    place = mapping.lp_fragment_address
    values: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
    if values.numel() == parameter.numel():  # bf16 under ZeRO-1 keeps whole gradients
        values = values[place.start : place.start + place.numel]
    if values.numel() != place.numel:
        raise AttributeError(f"{name}: {values.numel()} elements instead of {place.numel}")
    return Fragment(name, place.start, values)


def _zero3(name: str, parameter: Any, piece: Tensor, place: int) -> Fragment | None:
    # Every rank holds an equal piece, the last ones filled up beyond the parameter's end.
    start = place * parameter.ds_tensor.ds_numel
    numel = min(piece.numel(), parameter.ds_numel - start)
    return Fragment(name, start, piece.view(-1)[:numel]) if numel > 0 else None
