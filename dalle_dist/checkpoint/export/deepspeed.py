"""The folder that DeepSpeed's own `save_checkpoint` writes, for any ZeRO stage and number of ranks.

    OUT/latest                 the tag
    OUT/zero_to_fp32.py        DeepSpeed's script (stages 1 to 3)
    OUT/global_step1000/       the tag's folder:
        mp_rank_00_model_states.pt                         stage 0: all; 1, 2: the whole model
        zero_pp_rank_R_mp_rank_00_model_states.pt          stage 3: shapes alone
        [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt   stages 1 to 3: a rank's fp32 partition

A plain DeepSpeed engine of the same stage, ranks and precision, with AdamW in the groups of
`optim/param_groups.py`, goes on from it: `load_checkpoint(OUT, load_lr_scheduler_states=False)`. In
stage 0 and bf16 that is DeepSpeed's unfused optimizer, as it has for every AdamW but its own.
What DeepSpeed has no place for stays behind: averages, PowerSGD's errors, the position in the data.

Memory: DeepSpeed's files hold flat partitions and are written one at a time, so that the largest is
the bound. Of P parameters: 12 P / ranks bytes in stages 1 to 3, and before that 4 P (2 P in bf16)
for the whole model in 1 and 2; 12 P in stage 0 (14 P in bf16).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dalle_dist.checkpoint.export.files import Export
from dalle_dist.checkpoint.export.optimizer_states import flat_optimizer, whole_optimizer
from dalle_dist.checkpoint.export.partitions import (
    SUB_GROUP,
    Shapes,
    cut_partition,
    flat_partition,
    numbered,
    sub_groups,
)
from dalle_dist.checkpoint.export.training_state import ExportedState, Group, groups_of
from dalle_dist.checkpoint.manifest import Manifest
from dalle_dist.engine.deepspeed import saved_objects
from dalle_dist.engine.interface import WEIGHTS
from dalle_dist.errors import ConfigError
from dalle_dist.stages import STAGES

LATEST = "latest"
_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Layout:
    """For which engine: ZeRO stage, ranks, and dtype of the model's own weights.

    sub_group  largest number of a rank's elements in a sub-group of stage 3, `sub_group_size`
    """

    stage: int
    world: int
    dtype: torch.dtype
    sub_group: int = SUB_GROUP


@dataclass(frozen=True)
class _Source:
    """What is written, whatever the layout."""

    manifest: Manifest
    state: ExportedState
    groups: Sequence[Group]


def write(
    checkpoint: str,
    manifest: Manifest,
    out: str,
    stage: int | None = None,
    world: int | None = None,
    precision: str | None = None,
    groups: Sequence[Group] | None = None,
) -> list[str]:
    """Write a checkpoint as DeepSpeed's; the files written.

    Args:
        checkpoint: a step folder, verified; `manifest` is its.
        stage: of ZeRO; None: that of the run.
        world: ranks that will load it; None: those of the run (of a node, where ZeRO stayed in it).
        precision: "fp32", "bf16", or "fp16" (whose weights are fp32); None: that of the run.
        groups: of the optimizer; None: those of the run.

    Raises:
        CheckpointError: not all there, of no stage, or `out` holds an export already.
        ConfigError: a stage, number of ranks or precision that there is not.
        DataError: cannot be written there.
    """
    layout = _layout(manifest, stage, world, precision)
    groups = groups_of(checkpoint, manifest) if groups is None else groups
    source = _Source(manifest, ExportedState(checkpoint, manifest), groups)
    export, tag = Export(out, LATEST), f"global_step{manifest.step}"
    if layout.stage < 3:
        export.save(f"{tag}/mp_rank_00_model_states.pt", _whole_model(source, layout))
    for rank in range(layout.world if layout.stage else 0):
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        if layout.stage == 3:
            export.save(f"{tag}/{name}_model_states.pt", _empty_model(source, layout))
        prefix = "bf16_" if layout.dtype == torch.bfloat16 else ""
        export.save(f"{tag}/{prefix}{name}_optim_states.pt", _of_rank(source, layout, rank))
    if layout.stage > 0:
        export.make("zero_to_fp32.py", saved_objects.copy_script)
    return export.finish(tag)


def _layout(
    manifest: Manifest, stage: int | None, world: int | None, precision: str | None
) -> Layout:
    made = manifest.layout
    stage = made["zero_stage"] if stage is None else stage
    if world is None:
        world = made["ranks"] // (made["nodes"] if stage else 1)
    precision = precision or made["precision"]
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"stage: {stage} is not one of 0, 1, 2, 3")
    if world < 1:
        raise ConfigError(f"world: {world} is below 1")
    if precision not in _PRECISIONS:
        raise ConfigError(f"precision: '{precision}' is not one of {', '.join(_PRECISIONS)}")
    return Layout(stage, world, _PRECISIONS[precision], _sub_group(manifest))


def _sub_group(manifest: Manifest) -> int:
    """DeepSpeed's `sub_group_size` of the run, which the engine that loads must have too."""
    stage = manifest.training.get("stage")
    section = manifest.config.get(STAGES[stage].section, {}) if stage in STAGES else {}
    zero = (section.get("deepspeed") or {}).get("zero_optimization") or {}
    return int(zero.get("sub_group_size", SUB_GROUP))


def _whole_model(source: _Source, layout: Layout) -> dict[str, Any]:
    """Stages 0 to 2; in stage 0 with the optimizer."""
    state, groups = source.state, source.groups
    shapes = [sizes(group.shapes) for group in groups]
    found = model_states(source.manifest, layout.stage, layout.world, shapes)
    found["module"] = {name: state.whole(WEIGHTS, name).to(layout.dtype) for name in state.shapes}
    if layout.stage == 0:
        found["optimizer"] = whole_optimizer(state, groups, layout.dtype)
    return found


def _empty_model(source: _Source, layout: Layout) -> dict[str, Any]:
    """Stage 3, where DeepSpeed takes the weights from the partitions."""
    cut = [part for group in source.groups for part in _cut(group, layout)]
    found = model_states(source.manifest, 3, layout.world, [sizes(shapes) for shapes in cut])
    found["module"] = {name: torch.empty(0, dtype=layout.dtype) for name in source.state.shapes}
    return found


def _cut(group: Group, layout: Layout) -> list[Shapes]:
    return sub_groups(group.shapes, layout.world, layout.sub_group)


def _of_rank(source: _Source, layout: Layout, rank: int) -> dict[str, Any]:
    version = saved_objects.version()
    contents = {
        "zero_stage": layout.stage,
        "loss_scaler": saved_objects.loss_scaler(),
        "dynamic_loss_scale": False,
        "overflow": False,
        "ds_version": version,
        **(_cut_states if layout.stage == 3 else _flat_states)(source, layout, rank),
    }
    return {"optimizer_state_dict": contents, "ds_config": {}, "ds_version": version}


def _flat_states(source: _Source, layout: Layout, rank: int) -> dict[str, Any]:
    """Stages 1 and 2: one partition of each group."""
    state, groups = source.state, source.groups
    parts = [flat_partition(group.shapes, rank, layout.world) for group in groups]
    numbers = [[number] for number in range(len(groups))]
    return {
        "base_optimizer_state": flat_optimizer(state, groups, numbers, parts),
        "single_partition_of_fp32_groups": [
            state.partition(WEIGHTS, part)[: part.numel - part.padding] for part in parts
        ],
        "group_paddings": [part.padding for part in parts],
        "param_alignment_paddings": [[0] * len(group.shapes) for group in groups],
        "partition_count": [layout.world] * len(groups),
        "param_slice_mappings": [
            {run.name: saved_objects.address(run.at, run.numel) for run in part.runs}
            for part in parts
        ],
    }


def _cut_states(source: _Source, layout: Layout, rank: int) -> dict[str, Any]:
    """Stage 3: one partition of each sub-group."""
    state, groups = source.state, source.groups
    cut = [_cut(group, layout) for group in groups]
    parts = [cut_partition(shapes, rank, layout.world) for found in cut for shapes in found]
    return {
        "optimizer_state_dict": flat_optimizer(state, groups, numbered(cut), parts),
        "fp32_flat_groups": [state.partition(WEIGHTS, part) for part in parts],
        "partition_count": layout.world,
    }


def model_states(
    manifest: Manifest, stage: int, world: int, shapes: Sequence[Mapping[str, torch.Size]]
) -> dict[str, Any]:
    """All of a file of model states but the weights; `shapes` by group of the optimizer."""
    steps = manifest.training["optimizer_steps"]
    return {
        "module": {},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": list(shapes) if stage else None,
        "frozen_param_shapes": {} if stage > 1 else None,
        "shared_params": {} if stage else None,
        "frozen_param_fragments": {} if stage > 1 else None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": manifest.step - steps,
        "global_steps": manifest.step,
        "dp_world_size": world,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {},
        "ds_version": saved_objects.version(),
        "universal_checkpoint_info": saved_objects.universal_info(),
    }


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Size]:
    return {name: torch.Size(shape) for name, shape in shapes.items()}
