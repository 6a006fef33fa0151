"""Kinds of image tokenizers by name, the values of the config's `image_tokenizer.kind`."""

from __future__ import annotations

from pkgutil import resolve_name

import torch

from dalle_dist import storage
from dalle_dist.config import Config
from dalle_dist.errors import ConfigError
from dalle_dist.image_tokenizer.protocol import ImageTokenizer

# For `pkgutil.resolve_name`: imported when first asked for.
KINDS = {
    "dvae": "dalle_dist.image_tokenizer.dvae:DVAETokenizer",
    "dalle-pytorch": "dalle_dist.interop.dalle_pytorch.vae:DiscreteVAETokenizer",
    "vqgan": "dalle_dist.interop.vqgan_tokenizer:VQGANTokenizer",
}


def image_tokenizer_class(kind: str) -> type[ImageTokenizer]:
    """Raises ConfigError: no such kind."""
    if kind not in KINDS:
        raise ConfigError(f"image_tokenizer.kind: '{kind}' is not one of {', '.join(KINDS)}")
    found: type[ImageTokenizer] = resolve_name(KINDS[kind])
    return found


def load_image_tokenizer(
    kind: str, folder: str, device: torch.device | str = "cpu"
) -> ImageTokenizer:
    """The tokenizer in a release folder, local or remote.

    Raises:
        ConfigError: no such kind.
        CheckpointError: no release of this kind there.
    """
    return image_tokenizer_class(kind).load(folder, device)


def load_configured(config: Config, device: torch.device | str = "cpu") -> ImageTokenizer:
    """The tokenizer that a config names.

    Raises as `load_image_tokenizer` does, and ConfigError: its codes do not fit the transformer.
    """
    folder = image_tokenizer_folder(config)
    tokenizer = load_image_tokenizer(config.image_tokenizer.kind, folder, device)
    shape = config.transformer
    for key, wanted, found in (
        ("image_grid", shape.image_grid, tokenizer.grid),
        ("codebook_size", shape.codebook_size, tokenizer.codebook_size),
    ):
        if wanted != found:
            raise ConfigError(
                f"transformer.{key}: {wanted}, but the image tokenizer in {folder} has {found}"
            )
    return tokenizer


def image_tokenizer_folder(config: Config) -> str:
    """The release folder that a config names."""
    return config.image_tokenizer.path or storage.join(config.paths.dvae_run, "release")
