"""A checkpoint of any stage, any ZeRO stage and any number of ranks, to a release folder."""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

import torch

from dalle_dist import storage
from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.formats import SUFFIX, LazyTensors, has_tensors, tensor_files
from dalle_dist.checkpoint.manifest import Manifest, read_manifest
from dalle_dist.checkpoint.names import CONFIG, MANIFEST
from dalle_dist.checkpoint.read import TensorSource
from dalle_dist.config import from_dict
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.interface import WEIGHTS
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.stages import STAGES

_NONE = "no whole checkpoint here (a run, checkpoints/ or step-...)"
AVERAGE = "average"  # kind of the moving average
KINDS = {"ema": AVERAGE, "raw": WEIGHTS}


def convert(
    checkpoint: str, out: str, weights: str = "ema", dtype: torch.dtype = torch.float32
) -> str:
    """Write the release folder `out`, tensor by tensor; one process, nothing unpickled.

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
    manifest = read_manifest(step)
    read_training(step, manifest)
    return write_stage_release(out, manifest, weights_of(step, manifest, weights, dtype))


def write_stage_release(out: str, manifest: Manifest, state: LazyTensors) -> str:
    """Write the release folder of a checkpoint's stage; returns the weights' fingerprint."""
    stage = STAGES[manifest.training["stage"]]
    digest: str = resolve_name(stage.save)(out, from_dict(dict(manifest.config)), state)
    return digest


def weights_of(
    checkpoint: str, manifest: Manifest, weights: str = "ema", dtype: torch.dtype = torch.float32
) -> LazyTensors:
    """Whole tensors of a checkpoint, read one by one. Raises CheckpointError: not all there."""
    shapes = {name: tuple(shape) for name, shape in manifest.training["shapes"].items()}
    kind = KINDS[weights]
    if kind not in manifest.kinds:  # before the average's first update it is the weights
        kind = KINDS["raw"]
    source = TensorSource.of_checkpoint(checkpoint, manifest, kind)
    source.require(shapes, checkpoint)
    return LazyTensors(
        {name: (dtype, shape) for name, shape in shapes.items()},
        source.read,
    )


def release_weights(release: str, shapes: Mapping[str, tuple[int, ...]]) -> TensorSource:
    """The weights of a release folder of any stage, or of a safetensors file, for this model.

    Raises CheckpointError: none there, or they do not fit the shapes.
    """
    paths = [release] if release.endswith(SUFFIX) else []
    paths += [storage.join(release, entry.weights) for entry in STAGES.values()]
    found = [path for path in paths if has_tensors(path)]
    if not found:
        raise CheckpointError(f"{release}: no release folder, and no file of weights")
    # A transformer's release has its image tokenizer's weights beside it.
    sources = [TensorSource.of_files(tensor_files(path)) for path in found]
    fitting = [source for source in sources if source.numels.keys() == shapes.keys()]
    (fitting or sources)[-1].require(shapes, release)
    return fitting[-1]


def find_checkpoint(path: str, ranks: Ranks | None = None) -> str:
    """The step folder meant by a run, a checkpoints folder or a step folder; verified.

    With `ranks`, all of them must call it: they share the work of reading and agree.

    Raises CheckpointError when there is none that is whole.
    """
    folder = require_checkpoint(path)
    if storage.exists(storage.join(folder, MANIFEST)):
        store.verify(folder, ranks)
        return folder
    found = store.newest(folder, ranks)
    if not found:
        raise CheckpointError(f"{path}: {_NONE}")
    return found


def require_checkpoint(path: str) -> str:
    """The step folder, or the folder of checkpoints, that a path means; no tensor is read.

    Raises CheckpointError when there is none.
    """
    path = storage.normal(path)
    if storage.exists(storage.join(path, MANIFEST)):
        return path
    for inner in (storage.join(path, "checkpoints"), path):
        if store.steps(inner):
            return inner
    raise CheckpointError(f"{path}: {_NONE}")


def read_training(checkpoint: str, manifest: Manifest) -> Mapping[str, Any]:
    """What training goes on from, and `stage`. Raises CheckpointError: of no stage."""
    if manifest.training.get("stage") not in STAGES:
        raise CheckpointError(f"{checkpoint}: no checkpoint of {' or '.join(STAGES)}")
    return manifest.training
