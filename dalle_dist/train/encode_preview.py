"""A look at token shards: images, and below each what its codes are decoded to."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from dalle_dist import storage
from dalle_dist.config import Config
from dalle_dist.data.crops import Crops, ImageCrops
from dalle_dist.data.labelled_grid import grid, to_image
from dalle_dist.data.shards import ShardSet
from dalle_dist.image_tokenizer.protocol import ImageTokenizer
from dalle_dist.metrics.reconstruction import psnr

SHOWN = 12


def write_preview(config: Config, tokenizer: ImageTokenizer, part: str) -> str:
    """PART-preview.png beside the parts of the tokens, of images that lie evenly in one shard.

    Returns its path, and how near what is decoded comes to the images, in words.
    """
    images = ShardSet(storage.join(config.paths.images, part), "images")
    tokens = ShardSet(storage.join(config.paths.tokens, part), "tokens")
    images_BCHW, codes_BN, captions = _pairs(images, tokens, tokenizer.image_size)
    decoded_BCHW = tokenizer.decode(codes_BN).float().cpu()
    near = psnr(images_BCHW, decoded_BCHW).mean().item()
    rows = [[to_image(image) for image in row] for row in (images_BCHW, decoded_BCHW)]
    buffer = io.BytesIO()
    grid(rows, captions=[captions, [""] * len(captions)]).save(buffer, "PNG")
    path = storage.join(config.paths.tokens, f"{part}-preview.png")
    storage.write_bytes(path, buffer.getvalue())
    return f"{path} shows {len(captions)} of them, decoded to {near:.1f} dB"


def _pairs(images: ShardSet, tokens: ShardSet, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """(images_BCHW in [0, 1], codes_BN of their centred squares, captions)."""
    shard = int(np.flatnonzero(tokens.sizes)[0])
    # Token shards are those of the images in their order, but for shards without a readable image.
    number = int(tokens.index.shards[shard].name.removesuffix(".tar"))
    places = {key: place for place, key in enumerate(images.column(number, "key"))}
    cut = ImageCrops(images, number, Crops(size, 1, False, 0))
    count = min(SHOWN, int(tokens.sizes[shard]))
    samples = [tokens.read_at(shard, i * int(tokens.sizes[shard]) // count) for i in range(count)]
    pictures = [cut[places[sample["__key__"].decode()]].crops_KCHW for sample in samples]
    codes = [np.load(io.BytesIO(sample["npy"]), allow_pickle=False) for sample in samples]
    codes_BN = np.stack([code if code.ndim == 1 else code[0] for code in codes])
    images_BCHW = torch.cat([picture for picture in pictures if picture is not None]).float() / 255
    captions = [sample.get("txt", b"").decode(errors="replace") for sample in samples]
    return images_BCHW, torch.from_numpy(codes_BN.astype(np.int64)), captions
