"""Weights and moments of a checkpoint as an optimizer of torch's has them: fp32, in its groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from dalle_dist.checkpoint.convert import read_training
from dalle_dist.checkpoint.export.partitions import Partition, Shapes
from dalle_dist.checkpoint.manifest import Manifest
from dalle_dist.checkpoint.read import TensorSource
from dalle_dist.config import StageConfig, from_dict
from dalle_dist.engine.interface import MEAN, VARIANCE, WEIGHTS
from dalle_dist.errors import CheckpointError
from dalle_dist.gradients.piece import Piece
from dalle_dist.stages import STAGES

MOMENTS = (MEAN, VARIANCE)
# What torch's AdamW keeps of its group; ours takes no notice of them.
_TORCH = {
    "amsgrad": False, "maximize": False, "foreach": None, "capturable": False,
    "differentiable": False, "fused": None, "decoupled_weight_decay": True,
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Parameters that the optimizer treats alike, in the order of the model, and its options."""

    shapes: Shapes
    options: Mapping[str, Any]


class ExportedState:
    """A checkpoint's fp32 weights and moments, which are read where and when they are asked for.

    Moments that are packed in 16 bits are unpacked.

    Raises CheckpointError: weights or moments are not all there.
    """

    def __init__(self, checkpoint: str, manifest: Manifest) -> None:
        self.shapes = {name: tuple(shape) for name, shape in manifest.training["shapes"].items()}
        self._sources = {}
        for kind in (WEIGHTS, *MOMENTS):
            self._sources[kind] = TensorSource.of_checkpoint(checkpoint, manifest, kind)
            self._sources[kind].require(self.shapes, f"{checkpoint}: {kind}")
        self.step = torch.tensor(float(manifest.training["optimizer_steps"]))

    def whole(self, kind: str, name: str) -> Tensor:
        return self._sources[kind].tensor(name, self.shapes[name])

    def partition(self, kind: str, partition: Partition) -> Tensor:
        """A rank's flat elements, zeros where there is no parameter; no copy beside them."""
        flat = torch.zeros(partition.numel)
        for run in partition.runs:
            piece = Piece(run.name, run.start, flat[run.at : run.at + run.numel])
            if not self._sources[kind].fill([piece]):
                raise CheckpointError(f"'{run.name}' is not all there")
        return flat


def groups_of(checkpoint: str, manifest: Manifest) -> list[Group]:
    """The optimizer's groups in the run that wrote it (`optim/param_groups.py`); no tensor is read.

    Their learning rate is the config's: a schedule sets another before each step.

    Raises:
        CheckpointError: of no stage.
        ConfigError: its config is not one of this version.
    """
    stage = STAGES[read_training(checkpoint, manifest)["stage"]]
    config = from_dict(dict(manifest.config))
    with torch.device("meta"):
        decayed = set(resolve_name(stage.decayed)(resolve_name(stage.model)(config)))
    settings: StageConfig = getattr(config, stage.section)
    shapes = {name: tuple(shape) for name, shape in manifest.training["shapes"].items()}
    inside = {name: shape for name, shape in shapes.items() if name in decayed}
    outside = {name: shape for name, shape in shapes.items() if name not in decayed}
    options = {
        "lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps,
        "moments": "fp32", "variance_clip": settings.variance_clip,
    }  # fmt: skip
    decays = ((inside, settings.weight_decay), (outside, 0.0))
    return [Group(found, {**options, "weight_decay": wd}) for found, wd in decays if found]


def param_group(group: Group, numbers: Sequence[int]) -> dict[str, Any]:
    """As `state_dict` of torch's AdamW, and of ours, has it; `numbers` are of its parameters."""
    return {**_TORCH, **group.options, "params": list(numbers)}
