"""Release folders: all that generation, evaluation and other people need, and no pickle in them.

runs/DVAE/release/          config.yaml, dvae.safetensors
runs/TRANSFORMER/release/   config.yaml, dvae.safetensors, transformer.safetensors, tokenizer.json
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import yaml
from torch import nn

from dalle_dist.checkpoint.formats import (
    State,
    fingerprint,
    load_tensors,
    read_notes,
    save_tensors,
)
from dalle_dist.config import Config, difference, from_dict, to_yaml
from dalle_dist.data import storage
from dalle_dist.dvae.model import DVAE
from dalle_dist.errors import CheckpointError
from dalle_dist.tokenizer import Tokenizer
from dalle_dist.transformer.model import Transformer

CONFIG, DVAE_FILE, TRANSFORMER_FILE = "config.yaml", "dvae.safetensors", "transformer.safetensors"
TOKENIZER_FILE = "tokenizer.json"
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class DVAERelease:
    config: Config
    dvae: DVAE
    fingerprint: str  # of the dVAE's weights


@dataclass(frozen=True)
class Release:
    config: Config
    tokenizer: Tokenizer
    dvae: DVAE
    transformer: Transformer
    fingerprint: str  # of the transformer's weights
    dvae_fingerprint: str


def save_dvae_release(folder: str, config: Config, state: State) -> str:
    """Write the dVAE's release folder, config last; returns the weights' fingerprint."""
    save_tensors(storage.join(folder, DVAE_FILE), state)
    storage.write_bytes(storage.join(folder, CONFIG), to_yaml(config).encode())
    return fingerprint(state)


def load_dvae(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> DVAERelease:
    """dVAE of a dVAE's or a whole model's release folder, frozen, in fp32.

    Raises:
        CheckpointError: no release there, or weights that do not fit its config.
    """
    folder = os.fspath(folder)
    config = _read_config(folder)
    state = load_tensors(storage.join(folder, DVAE_FILE))
    dvae = _fill(DVAE(config.dvae), state, storage.join(folder, DVAE_FILE))
    return DVAERelease(config, dvae.to(device), fingerprint(state))


def save_release(
    folder: str, config: Config, transformer: State, tokenizer: str, dvae_folder: str
) -> str:
    """Write a whole model's release folder, config last; returns the transformer's fingerprint.

    The config's dVAE section is taken from `dvae_folder`: the codes are that dVAE's.
    """
    dvae_config = _read_config(dvae_folder)
    config = dataclasses.replace(config, dvae=dvae_config.dvae, dvae_train=dvae_config.dvae_train)
    dvae = storage.read_bytes(storage.join(dvae_folder, DVAE_FILE))
    storage.write_bytes(storage.join(folder, DVAE_FILE), dvae)
    storage.write_bytes(storage.join(folder, TOKENIZER_FILE), storage.read_bytes(tokenizer))
    save_tensors(storage.join(folder, TRANSFORMER_FILE), transformer, _masks(config))
    storage.write_bytes(storage.join(folder, CONFIG), to_yaml(config).encode())
    return fingerprint(transformer)


def load_release(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> Release:
    """Everything of a release folder, local or remote, frozen, in fp32.

    Raises:
        CheckpointError: no release there, or weights that do not fit its config: other shapes, or
            trained under other masks.
    """
    folder = os.fspath(folder)
    stage1 = load_dvae(folder, device)
    if not storage.exists(storage.join(folder, TRANSFORMER_FILE)):
        raise CheckpointError(
            f"{folder}: holds a dVAE alone ({TRANSFORMER_FILE} is missing); name the release of a "
            "transformer's run"
        )
    path = storage.join(folder, TRANSFORMER_FILE)
    state = load_tensors(path)
    _refuse_other_masks(path, stage1.config)
    transformer = _fill(Transformer(stage1.config), state, path).to(device)
    tokenizer = Tokenizer.load(storage.join(folder, TOKENIZER_FILE))
    return Release(
        stage1.config, tokenizer, stage1.dvae, transformer, fingerprint(state), stage1.fingerprint
    )


def _read_config(folder: str) -> Config:
    # A run has a config too: it is the weights that make a folder a release.
    missing = [n for n in (CONFIG, DVAE_FILE) if not storage.exists(storage.join(folder, n))]
    if missing:
        hint = _hint(folder)
        raise CheckpointError(f"{folder}: no release folder ({missing[0]} is missing){hint}")
    return from_dict(yaml.safe_load(storage.read_bytes(storage.join(folder, CONFIG))))


def _hint(folder: str) -> str:
    """The mend, where the folder of a run was named in place of its release."""
    inner = storage.join(folder, "release")
    if storage.exists(storage.join(inner, CONFIG)):
        return f"; did you mean {inner}?"
    if storage.exists(storage.join(folder, "checkpoints")):
        return "; this run has none yet: go on with --resume auto"
    return ""


def _masks(config: Config) -> dict[str, str]:
    """What the weights were trained to look at, which no shape of theirs tells."""
    shape = config.transformer
    names = ("masks", "mask_variant", "conv_kernel", "text_tokens", "image_grid")
    return {f"transformer.{name}": str(getattr(shape, name)) for name in names}


def _refuse_other_masks(path: str, config: Config) -> None:
    masks = _masks(config)
    notes = {name: note for name, note in read_notes(path).items() if name in masks}
    if not notes:
        raise CheckpointError(f"{path}: does not say under which masks it was trained")
    lines = difference(notes, masks)
    if lines:
        raise CheckpointError(
            f"{path}: trained under other masks than its config says: {'; '.join(lines)}"
        )


def _fill(model: Module, state: State, path: str) -> Module:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors do not fit its config, first '{wrong[0]}': config says "
            f"{expected.get(wrong[0], 'absent')}, file has {found.get(wrong[0], 'none')}"
        )
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
