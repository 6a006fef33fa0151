"""A training checkpoint of any ZeRO stage and any number of ranks to a release folder."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.release import CONFIG, save_release
from dalle_dist.checkpoint.weights import KINDS, load_weights
from dalle_dist.config import Config, from_dict
from dalle_dist.data import storage
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.transformer.model import Transformer


def convert(checkpoint: str, out: str, weights: str = "ema") -> str:
    """Write the release folder `out`; one process, no DeepSpeed, nothing unpickled.

    Args:
        checkpoint: a run, its checkpoints/ (the newest whole one is taken), or one step-... folder.
        out: the release folder, local or remote.
        weights: "ema", the average, or "raw", the fp32 master weights.

    Returns:
        The fingerprint of the transformer's weights.

    Raises:
        CheckpointError: no whole checkpoint there, or `out` holds a release already.
    """
    if weights not in KINDS:
        raise ConfigError(f"weights: '{weights}' is not one of {', '.join(KINDS)}")
    if storage.exists(storage.join(out, CONFIG)):
        raise CheckpointError(f"{out}: holds a release already; choose another folder")
    step = find_checkpoint(checkpoint)
    store.verify(step)
    config = read_config(step)
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state = load_weights(step, weights, shapes)
    dvae = storage.join(config.paths.dvae_run, "release")
    return save_release(out, config, state, config.paths.tokenizer, dvae)


def find_checkpoint(path: str) -> Path:
    """The step folder meant by a run, a checkpoints folder or a step folder.

    Raises CheckpointError when there is none.
    """
    folder = storage.fetch_folder(path) if storage.is_remote(path) else Path(path)
    if (folder / store.MANIFEST).is_file():
        return folder
    for place in (folder / "checkpoints", folder):
        found = store.latest(place)
        if found is not None:
            return found
    raise CheckpointError(f"{path}: no whole checkpoint here (a run, checkpoints/ or step-...)")


def read_config(step: Path) -> Config:
    """The config a checkpoint was saved with. Raises CheckpointError when it has none."""
    path = step / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{step}: no checkpoint of a transformer ({CONFIG} is missing)")
    return from_dict(yaml.safe_load(path.read_text()))
