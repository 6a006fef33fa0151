"""From an imported model to a release folder, and the proof that the folder holds that model.

Shape suffixes: B samples, T text tokens, N image tokens.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor

from dalle_dist import storage
from dalle_dist.checkpoint.formats import fill
from dalle_dist.checkpoint.names import CONFIG
from dalle_dist.checkpoint.release import (
    TOKENIZER_FILE,
    load_release,
    load_release_image_tokenizer,
    save_release,
)
from dalle_dist.config import Config, to_yaml
from dalle_dist.errors import CheckpointError, DataError
from dalle_dist.image_tokenizer.dvae import DVAETokenizer
from dalle_dist.image_tokenizer.protocol import ImageTokenizer
from dalle_dist.image_tokenizer.registry import image_tokenizer_class
from dalle_dist.interop.imported import Imported
from dalle_dist.interop.saved_tokenizer import SavedTokenizer
from dalle_dist.text_tokenizer.protocol import PAD
from dalle_dist.transformer.protocol import TextImageTransformer
from dalle_dist.transformer.registry import build_transformer


def write_release(imported: Imported, folder: str) -> str:
    """Write a release folder, config last; returns the fingerprint of its model.

    Raises:
        CheckpointError: `folder` holds a release already.
        DataError: a transformer without a text tokenizer.
    """
    if storage.exists(storage.join(folder, CONFIG)):
        raise CheckpointError(f"{folder}: holds a release already; choose another folder")
    kind, parts = tokenizer_class(imported), imported.image_tokenizer
    if imported.state is None:
        digest = kind.save(folder, parts.shape, parts.state)
        storage.write_bytes(storage.join(folder, CONFIG), to_yaml(imported.config).encode())
        return digest
    if imported.tokenizer is None:
        raise DataError(
            f"{imported.peer}: its text tokenizer is not in these files; name it by --tokenizer"
        )
    with tempfile.TemporaryDirectory() as beside:
        kind.save(beside, parts.shape, parts.state)
        tokenizer = storage.join(beside, TOKENIZER_FILE)
        storage.write_bytes(tokenizer, imported.tokenizer)
        return save_release(folder, imported.config, imported.state, tokenizer, beside)


@torch.no_grad()
def parity(imported: Imported, folder: str) -> dict[str, float]:
    """Largest differences between what was read and the release in `folder`, loaded anew.

    Of the text and image logits of fixed captions and codes, and of the images that the image
    tokenizer makes of those codes; 0 where the folder holds what was read.
    """
    if imported.state is None:
        written = _made(None, load_release_image_tokenizer(folder), imported.config)
    else:
        release = load_release(folder)
        written = _made(release.transformer, release.image_tokenizer, imported.config)
    return {name: apart(values, written[name]) for name, values in outputs(imported).items()}


@torch.no_grad()
def outputs(imported: Imported) -> dict[str, Tensor]:
    """Logits of fixed captions and codes, and the images of those codes."""
    parts = imported.image_tokenizer
    tokenizer = tokenizer_class(imported).of(parts.shape, parts.state)
    model = None if imported.state is None else model_of(imported)
    return _made(model, tokenizer, imported.config)


def _made(
    model: TextImageTransformer | None, tokenizer: ImageTokenizer, config: Config
) -> dict[str, Tensor]:
    codes_BN = draw(tokenizer.codebook_size, (2, tokenizer.grid**2))
    images = {"images": tokenizer.decode(codes_BN)}
    if model is None:
        return images
    text_BTV, image_BNK = model.logits(captions(config), codes_BN)
    return {"text logits": text_BTV, "image logits": image_BNK} | images


def model_of(imported: Imported) -> TextImageTransformer:
    """The transformer that was read, frozen. Raises CheckpointError: weights do not fit."""
    if imported.state is None:
        raise CheckpointError(f"{imported.peer}: an image tokenizer alone, without a transformer")
    with torch.device("meta"):
        model = build_transformer(imported.config)
    return fill(model, imported.state, imported.peer)


def tokenizer_class(imported: Imported) -> type[SavedTokenizer | DVAETokenizer]:
    """The class of its image tokenizer."""
    kind = image_tokenizer_class(imported.config.image_tokenizer.kind)
    assert issubclass(kind, (SavedTokenizer, DVAETokenizer))
    return kind


def captions(config: Config) -> Tensor:
    """text_BT of a full caption, and of one that ends early where there is room."""
    text_BT = draw(config.tokenizer.vocab_size - 3, (2, config.transformer.text_tokens)) + 3
    text_BT[1, 1 + config.transformer.text_tokens // 2 :] = PAD
    return text_BT


def draw(classes: int, shape: tuple[int, ...]) -> Tensor:
    """The same numbers below `classes` each time."""
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(0))


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two elements."""
    return float((ours - theirs).abs().max())
