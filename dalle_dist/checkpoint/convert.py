"""A checkpoint of any stage, any ZeRO stage and any number of ranks, to a release folder."""

from __future__ import annotations

import json
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import yaml
from torch import nn

from dalle_dist import storage
from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.release import CONFIG
from dalle_dist.checkpoint.weights import KINDS, load_weights
from dalle_dist.config import Config, from_dict
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.stages import STAGES

_NONE = "no whole checkpoint here (a run, checkpoints/ or step-...)"
TRAINING = "training.json"  # in a checkpoint: which stage wrote it, and where it goes on


def convert(checkpoint: str, out: str, weights: str = "ema") -> str:
    """Write the release folder `out`; one process, no DeepSpeed, nothing unpickled.

    Args:
        checkpoint: a run, its checkpoints/ (the newest whole one is taken), or one step-... folder.
        out: the release folder, local or remote.
        weights: "ema", the average, or "raw", the fp32 master weights.

    Returns:
        The fingerprint of the model's weights.

    Raises:
        CheckpointError: no whole checkpoint there, or `out` holds a release already.
    """
    if weights not in KINDS:
        raise ConfigError(f"weights: '{weights}' is not one of {', '.join(KINDS)}")
    if storage.exists(storage.join(out, CONFIG)):
        raise CheckpointError(f"{out}: holds a release already; choose another folder")
    step = find_checkpoint(checkpoint)
    store.verify(step)
    config, stage = read_config(step), STAGES[read_training(step)["stage"]]
    with torch.device("meta"):
        model: nn.Module = resolve_name(stage.model)(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    digest: str = resolve_name(stage.save)(out, config, load_weights(step, weights, shapes))
    return digest


def find_checkpoint(path: str, ranks: Ranks | None = None) -> Path:
    """The step folder meant by a run, a checkpoints folder or a step folder.

    With `ranks`, all of them must call it: they share the work of reading and agree.

    Raises CheckpointError when there is none.
    """
    folder = require_checkpoint(path)
    if (folder / store.MANIFEST).is_file():
        return folder
    found = store.latest(folder, ranks)
    if found is None:
        raise CheckpointError(f"{path}: {_NONE}")
    return found


def require_checkpoint(path: str) -> Path:
    """The step folder, or the folder of checkpoints, that a path means; nothing is read.

    Raises CheckpointError when there is none.
    """
    folder = storage.fetch_folder(path) if storage.is_remote(path) else Path(path)
    if (folder / store.MANIFEST).is_file():
        return folder
    for inner in (folder / "checkpoints", folder):
        if store.steps(inner):
            return inner
    raise CheckpointError(f"{path}: {_NONE}")


def read_config(step: Path) -> Config:
    """The config a checkpoint was saved with. Raises CheckpointError when it has none."""
    path = step / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{step}: no checkpoint ({CONFIG} is missing)")
    return from_dict(yaml.safe_load(path.read_text()))


def read_training(step: Path) -> dict[str, Any]:
    """What training goes on from, and `stage`. Raises CheckpointError: none, or of no stage."""
    path = step / TRAINING
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("stage") not in STAGES:
        raise CheckpointError(f"{step}: no checkpoint of {' or '.join(STAGES)} ({TRAINING})")
    return found
