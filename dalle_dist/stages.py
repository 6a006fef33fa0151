"""The training stages: their verbs, and how a checkpoint of each becomes a release.

A new one is a `Stage` of its own (`train/stage.py`) and one entry here. Read without torch; what an
entry names is imported when first asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

# Files that a user puts into a run's folder, and a run obeys within seconds.
STOP, SAVE = "stop", "save"
# What a job that came no further writes there: how often in a row.
IN_VAIN = "starts-in-vain.json"


@dataclass(frozen=True)
class StageEntry:
    """Functions by name, for `pkgutil.resolve_name`.

    verb   of the command line, and what --help says of it
    train  (config, resume, new_epoch): runs the stage
    section  of the config with its settings
    run    key of the config's `paths` for its runs
    model  (config): the model whose weights a checkpoint holds
    decayed  (model): names of its parameters with weight decay
    weights  the release's file of weights
    save   (folder, config, weights): writes the release folder, returns the weights' fingerprint
    """

    verb: str
    help: str
    train: str
    section: str
    run: str
    model: str
    decayed: str
    weights: str
    save: str


# By the name that a checkpoint has of its stage.
STAGES = {
    "dvae": StageEntry(
        "train-dvae",
        "stage 1: learn image tokens",
        "dalle_dist.train.dvae:train_dvae",
        "dvae_train",
        "dvae_run",
        "dalle_dist.dvae.model:configured_dvae",
        "dalle_dist.dvae.model:decayed",
        "dvae.safetensors",
        "dalle_dist.checkpoint.release:save_dvae_release",
    ),
    "transformer": StageEntry(
        "train",
        "stage 2: learn text and image tokens in one stream",
        "dalle_dist.train.transformer:train",
        "train",
        "run",
        "dalle_dist.transformer.registry:build_transformer",
        "dalle_dist.transformer.blocks:decayed",
        "transformer.safetensors",
        "dalle_dist.checkpoint.release:save_transformer_release",
    ),
    "clip": StageEntry(
        "train-clip",
        "a CLIP, which ranks generated images by their captions",
        "dalle_dist.train.clip:train_clip",
        "clip_train",
        "clip_run",
        "dalle_dist.clip.model:LossCLIP",
        "dalle_dist.clip.model:decayed",
        "model.safetensors",
        "dalle_dist.clip.release:save_clip_release",
    ),
}


def stage_of(verb: str) -> StageEntry | None:
    """The training stage of a verb; None for other verbs."""
    return next((stage for stage in STAGES.values() if stage.verb == verb), None)
