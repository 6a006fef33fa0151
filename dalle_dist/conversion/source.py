"""What the paths given to `convert` hold: a checkpoint, a release, or another program's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle_dist import storage
from dalle_dist.checkpoint.convert import find_checkpoint, require_checkpoint
from dalle_dist.checkpoint.formats import has_tensors
from dalle_dist.checkpoint.manifest import Manifest, read_manifest
from dalle_dist.checkpoint.names import CONFIG
from dalle_dist.checkpoint.release import read_release_config
from dalle_dist.config import Config, from_dict
from dalle_dist.errors import CheckpointError
from dalle_dist.interop.registry import detect
from dalle_dist.stages import STAGES


@dataclass(frozen=True)
class CheckpointSource:
    """A whole checkpoint of ours; every byte of it has been verified."""

    path: str
    manifest: Manifest

    @property
    def stage(self) -> str:
        return str(self.manifest.training["stage"])

    @property
    def config(self) -> Config:
        return from_dict(dict(self.manifest.config))

    def __str__(self) -> str:
        layout = self.manifest.layout
        return (
            f"{self.path}: checkpoint of {STAGES[self.stage].verb}, step {self.manifest.step:,}, "
            f"written by {layout['ranks']} ranks under ZeRO-{layout['zero_stage']}"
        )


@dataclass(frozen=True)
class ReleaseSource:
    """A release folder of ours, whose model is that of `stage`."""

    path: str
    stage: str
    config: Config

    def __str__(self) -> str:
        return f"{self.path}: release of {STAGES[self.stage].verb}"


@dataclass(frozen=True)
class PeerSource:
    """Files of another program."""

    paths: tuple[Path, ...]
    peer: str

    def __str__(self) -> str:
        return f"{' '.join(map(str, self.paths))}: a model of {self.peer}"


Source = CheckpointSource | ReleaseSource | PeerSource


def find_source(paths: Sequence[str]) -> Source:
    """Tell what the paths are; only files of another program may be several.

    Raises CheckpointError: nothing that is known, or a checkpoint without a whole one.
    """
    if len(paths) == 1:
        found = _release(paths[0]) or _checkpoint(paths[0])
        if found is not None:
            return found
        _refuse_deepspeed(paths[0])
    local = tuple(_local(path) for path in paths)
    return PeerSource(local, detect(local))


def _release(path: str) -> ReleaseSource | None:
    if not storage.exists(storage.join(path, CONFIG)):
        return None
    for name in ("transformer", "dvae", "clip"):  # that of a transformer has a dVAE's weights too
        if has_tensors(storage.join(path, STAGES[name].weights)):
            return ReleaseSource(path, name, read_release_config(path))
    return None


def _checkpoint(path: str) -> CheckpointSource | None:
    try:
        require_checkpoint(path)
    except CheckpointError:
        return None
    found = find_checkpoint(path)
    return CheckpointSource(found, read_manifest(found))


def _refuse_deepspeed(path: str) -> None:
    if storage.is_remote(path) or not Path(path).is_dir():
        return
    if any(Path(path).glob("**/*mp_rank_*_model_states.pt")):
        raise CheckpointError(
            f"{path}: DeepSpeed's own checkpoint; make a state dict of it with the zero_to_fp32.py "
            "that lies in it, and convert that"
        )


def _local(path: str) -> Path:
    if not storage.is_remote(path):
        return Path(storage.normal(path))
    return storage.fetch(path) if storage.exists(path) else storage.fetch_folder(path)
