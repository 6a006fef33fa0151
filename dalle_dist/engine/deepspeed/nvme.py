"""Weights and moments that DeepSpeed keeps on NVMe, as tensors that are its files.

ZeRO-3 keeps the fp32 weights and the moments of each sub-group in a raw file each, and reads them
into its few buffers for that sub-group's update alone. Mapped into memory they are read from and
written to where they lie, so that no checkpoint holds all of them in main memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_dist.optim.adamw import MOMENT_NAMES, AdamW
from dalle_dist.storage.local import flush


def swapped(optimizer: Any) -> list[int]:
    """Numbers of the sub-groups on NVMe of a ZeRO-3 optimizer; those below 1 MiB stay in memory."""
    numbers = range(len(optimizer.fp16_groups))
    return [n for n in numbers if optimizer._swappable_optimizer_subgroup(n)]


def mapped_weights(optimizer: Any) -> dict[int, Tensor]:
    """fp32 weights of the sub-groups on NVMe, by number; each flat."""
    return {number: _mapped(optimizer, number, "") for number in swapped(optimizer)}


def mapped_moments(optimizer: Any, adamw: AdamW) -> dict[int, dict[str, Tensor]]:
    """The same of the moments, by name; zeros before the first step."""
    found = {}
    for number in swapped(optimizer):
        _make_moments(optimizer, adamw, number)
        found[number] = {name: _mapped(optimizer, number, f"{name}-") for name in MOMENT_NAMES}
    return found


@torch.no_grad()
def weights_from_files(optimizer: Any, number: int) -> None:
    """Have the model compute with the weights that are in a sub-group's file."""
    flat, swapper = optimizer.fp32_partitioned_groups_flat[number], optimizer.optimizer_swapper
    for name in ("", *(f"{moment}-" for moment in MOMENT_NAMES)):
        flush(_path(optimizer, number, name))  # DeepSpeed reads past the page cache
    swapper.swap_in_optimizer_state(parameter=flat)
    optimizer._reassign_or_swap_out_partitioned_parameters(number)
    swapper.release_swap_buffers(parameter=flat)
    flat.grad = None


def _make_moments(optimizer: Any, adamw: AdamW, number: int) -> None:
    flat, swapper = optimizer.fp32_partitioned_groups_flat[number], optimizer.optimizer_swapper
    if adamw.state.get(flat):
        return
    swapper.swap_in_optimizer_state(parameter=flat)
    adamw.state_of(flat, adamw.param_groups[optimizer.sub_group_to_group_id[number]])
    swapper.swap_out_optimizer_state(parameter=flat)
    flat.grad = None


def _mapped(optimizer: Any, number: int, prefix: str) -> Tensor:
    numel = int(optimizer.fp16_partitioned_groups_flat_numel[number])
    path = _path(optimizer, number, prefix)
    if path.stat().st_size < 4 * numel:
        raise RuntimeError(f"{path}: DeepSpeed's file is shorter than {numel} fp32 elements")
    return torch.from_file(str(path), shared=True, size=numel, dtype=torch.float32)


def _path(optimizer: Any, number: int, prefix: str) -> Path:
    flat = optimizer.fp32_partitioned_groups_flat[number]
    return Path(optimizer.optimizer_swapper.swap_folder) / f"{prefix}{flat.ds_id}.tensor.swp"
