"""DeepSpeed's universal checkpoint, which an engine with any number of ranks takes.

    OUT/latest_universal                         the tag
    OUT/global_step1000/zero/NAME/fp32.pt        a whole weight, and so exp_avg.pt, exp_avg_sq.pt
                            /NAME/step.pt
                            /optimizer_state.pt  options of the optimizer's groups
                       /mp_rank_00_model_states.pt                counts; read under stages 1 and 2
                       /zero_pp_rank_0_mp_rank_00_model_states.pt the same; under stage 3

It is what DeepSpeed's `ds_to_universal` makes of `deepspeed.py`'s folder under stage 1 or 2, and
one that stage 3 takes too. With `"checkpoint": {"load_universal": true}` and AdamW in the groups of
`optim/param_groups.py` an engine loads it: `load_checkpoint(OUT, load_lr_scheduler_states=False)`.
Without ZeRO DeepSpeed loads no universal checkpoint.

DeepSpeed 0.19.8 gives, under stage 3, all groups the options of the first: weight decay is left out
there, so that each keeps its own. And all groups one and the same tensor `step`, which each counts
up; before the first step of more than one group, give each its own:

    for state in engine.optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()

Memory: one tensor at a time, 4 bytes x the largest parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dalle_dist.checkpoint.export.deepspeed import model_states, sizes
from dalle_dist.checkpoint.export.files import Export
from dalle_dist.checkpoint.export.training_state import (
    MOMENTS,
    ExportedState,
    Group,
    groups_of,
    param_group,
)
from dalle_dist.checkpoint.manifest import Manifest
from dalle_dist.engine.deepspeed import saved_objects
from dalle_dist.engine.interface import WEIGHTS

LATEST = "latest_universal"
FILES = {WEIGHTS: "fp32", **{kind: kind for kind in MOMENTS}}


def write(
    checkpoint: str, manifest: Manifest, out: str, groups: Sequence[Group] | None = None
) -> list[str]:
    """Write a checkpoint as DeepSpeed's universal one; the files written.

    Args:
        checkpoint: a step folder, verified; `manifest` is its.
        groups: of the optimizer; None: those of the run.

    Raises:
        CheckpointError: not all there, of no stage, or `out` holds an export already.
        DataError: cannot be written there.
    """
    groups = groups_of(checkpoint, manifest) if groups is None else groups
    state, export = ExportedState(checkpoint, manifest), Export(out, LATEST)
    tag = f"global_step{manifest.step}"
    for name in state.shapes:
        for kind, file in FILES.items():
            # Whole along the axis on which tensor-parallel ranks would be joined.
            whole = {"param": state.whole(kind, name), "cat_dim": 0}
            export.save(f"{tag}/zero/{name}/{file}.pt", whole)
        export.save(f"{tag}/zero/{name}/step.pt", state.step)
    export.save(f"{tag}/zero/optimizer_state.pt", _optimizer_state(state.step, groups))
    for stage, prefix in ((2, ""), (3, "zero_pp_rank_0_")):
        shapes = [sizes(group.shapes) for group in groups]
        counts = model_states(manifest, stage, 1, shapes)
        export.save(f"{tag}/{prefix}mp_rank_00_model_states.pt", counts)
    return export.finish(tag)


def _optimizer_state(step: torch.Tensor, groups: Sequence[Group]) -> dict[str, Any]:
    numbered = [param_group(group, [number]) for number, group in enumerate(groups)]
    # For stage 3, which gives them to all groups.
    shared = {key: value for key, value in numbered[0].items() if key != "weight_decay"}
    return {
        "loss_scaler": saved_objects.loss_scaler(),
        "dynamic_loss_scale": False,
        "overflow": False,
        "ds_version": saved_objects.version(),
        "param_groups": numbered,
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [shared]},
    }
