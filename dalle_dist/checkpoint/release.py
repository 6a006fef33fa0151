"""Release folders: all that generation, evaluation and other people need, and no pickle in them.

runs/DVAE/release/          config.yaml, and the image tokenizer: dvae.safetensors
runs/TRANSFORMER/release/   config.yaml, transformer.safetensors, tokenizer.json, and a copy of the
                            image tokenizer's files

That of train-clip is in `dalle_dist/clip/release.py`.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import torch
import yaml

from dalle_dist import storage
from dalle_dist.checkpoint.formats import (
    SUFFIX,
    Tensors,
    fill,
    fingerprint,
    has_tensors,
    load_tensors,
    read_notes,
    save_tensors,
)
from dalle_dist.checkpoint.names import CONFIG
from dalle_dist.config import Config, ImageTokenizerConfig, difference, from_dict, to_yaml
from dalle_dist.errors import CheckpointError
from dalle_dist.image_tokenizer.dvae import save_dvae
from dalle_dist.image_tokenizer.protocol import ImageTokenizer
from dalle_dist.image_tokenizer.registry import (
    image_tokenizer_class,
    image_tokenizer_folder,
    load_image_tokenizer,
)
from dalle_dist.text_tokenizer.protocol import TextTokenizer
from dalle_dist.text_tokenizer.registry import load_text_tokenizer
from dalle_dist.transformer.protocol import TextImageTransformer
from dalle_dist.transformer.registry import build_transformer

TRANSFORMER_FILE, TOKENIZER_FILE = f"transformer{SUFFIX}", "tokenizer.json"


@dataclass(frozen=True)
class Release:
    """A whole model, frozen, in fp32; `fingerprint` is of the transformer's weights."""

    config: Config
    tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    transformer: TextImageTransformer
    fingerprint: str


def save_dvae_release(folder: str, config: Config, state: Tensors) -> str:
    """Write the dVAE's release folder, config last; returns the weights' fingerprint."""
    digest = save_dvae(folder, config.dvae, state)
    storage.write_bytes(storage.join(folder, CONFIG), to_yaml(config).encode())
    return digest


def save_transformer_release(folder: str, config: Config, state: Tensors) -> str:
    """`save_release` with the tokenizers that the config names."""
    return save_release(
        folder, config, state, config.paths.tokenizer, image_tokenizer_folder(config)
    )


def save_release(
    folder: str, config: Config, transformer: Tensors, tokenizer: str, image_tokenizer: str
) -> str:
    """Write a whole model's release folder, config last; returns the transformer's fingerprint.

    Args:
        tokenizer: file of the text tokenizer.
        image_tokenizer: release folder of the image tokenizer, which is copied.
    """
    kind = config.image_tokenizer.kind
    for name in image_tokenizer_class(kind).files:
        data = storage.read_bytes(storage.join(image_tokenizer, name))
        storage.write_bytes(storage.join(folder, name), data)
    storage.write_bytes(storage.join(folder, TOKENIZER_FILE), storage.read_bytes(tokenizer))
    digest = save_tensors(storage.join(folder, TRANSFORMER_FILE), transformer, _masks(config))
    config = dataclasses.replace(config, image_tokenizer=ImageTokenizerConfig(kind=kind))
    storage.write_bytes(storage.join(folder, CONFIG), to_yaml(config).encode())
    return digest


def load_release(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> Release:
    """Everything of a release folder, local or remote, frozen, in fp32.

    Raises:
        CheckpointError: no release there, or weights that do not fit its config: other shapes, or
            trained under other masks.
    """
    folder = os.fspath(folder)
    config = read_release_config(folder)
    image_tokenizer = load_image_tokenizer(config.image_tokenizer.kind, folder, device)
    path = storage.join(folder, TRANSFORMER_FILE)
    if not has_tensors(path):
        raise CheckpointError(
            f"{folder}: holds an image tokenizer alone ({TRANSFORMER_FILE} is missing); name the "
            "release of a transformer's run"
        )
    state = load_tensors(path)
    _refuse_other_masks(path, config)
    with torch.device("meta"):
        model = build_transformer(config)
    transformer = fill(model, state, path).to(device)
    tokenizer = load_text_tokenizer(config.tokenizer.kind, storage.join(folder, TOKENIZER_FILE))
    return Release(config, tokenizer, image_tokenizer, transformer, fingerprint(state))


def has_transformer(folder: str) -> bool:
    """Whether a release folder is a whole model's, and not that of an image tokenizer alone."""
    return has_tensors(storage.join(folder, TRANSFORMER_FILE))


def load_release_image_tokenizer(folder: str, device: torch.device | str = "cpu") -> ImageTokenizer:
    """The image tokenizer of any release folder. Raises CheckpointError: no release there."""
    return load_image_tokenizer(read_release_config(folder).image_tokenizer.kind, folder, device)


def read_release_config(folder: str) -> Config:
    """Raises CheckpointError: no release folder, or its config cannot be read."""
    path = storage.join(folder, CONFIG)
    # A run has a config too: it is the weights that make a folder a release.
    if not storage.exists(path):
        raise CheckpointError(f"{folder}: no release folder ({CONFIG} is missing)")
    try:
        tree = yaml.safe_load(storage.read_bytes(path))
        if not isinstance(tree, dict):
            raise ValueError(f"a {type(tree).__name__} in place of sections")
    except (yaml.YAMLError, ValueError) as error:
        raise CheckpointError(f"{path}: not a config ({' '.join(str(error).split())})") from None
    return from_dict(tree)


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
