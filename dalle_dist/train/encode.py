"""Between the stages: the codes of every image, computed once (paper 2.2)."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dalle_dist import storage
from dalle_dist.config import Config
from dalle_dist.data.image_dataset import ImageDataset
from dalle_dist.data.shards import ShardIndex, ShardWriter
from dalle_dist.distributed import process_group
from dalle_dist.errors import DataError
from dalle_dist.image_tokenizer.protocol import ImageTokenizer
from dalle_dist.image_tokenizer.registry import load_configured

PARTS = ("train", "held-out")
BATCH = 64


def encode(config: Config) -> None:
    """Image shards to token shards, for the training and the held-out part.

    Raises:
        ConfigError: the image tokenizer's shape is not the config's, or a GPU was granted that
            torch does not see.
        DataError: no shards, nothing readable, or the output holds another tokenizer's tokens.
    """
    device = process_group.device_of()
    tokenizer = load_configured(config, device)
    for part in PARTS:
        _encode_part(config, tokenizer, part)


def _encode_part(config: Config, tokenizer: ImageTokenizer, part: str) -> None:
    source, out = (storage.join(p, part) for p in (config.paths.images, config.paths.tokens))
    meta = {
        "image_tokenizer": tokenizer.fingerprint,
        "grid": tokenizer.grid,
        "codebook_size": tokenizer.codebook_size,
        "source": [shard.sha256 for shard in ShardIndex.load(source).shards],
    }
    if storage.exists(storage.join(out, "index.json")):
        _refuse_other(out, meta)
        print(f"{out}: already encoded by {tokenizer.fingerprint}; nothing to do")
        return
    dataset = ImageDataset(source, None, tokenizer.image_size, None, config.seed)
    with ShardWriter(out, "tokens", meta) as writer:
        for start in tqdm(range(0, len(dataset), BATCH), desc=f"encode {part}", unit="batch"):
            _write_batch(dataset, range(start, min(start + BATCH, len(dataset))), tokenizer, writer)
    skipped = f", {dataset.corrupt} corrupt images skipped" if dataset.corrupt else ""
    print(f"{out}: {ShardIndex.load(out).samples} images{skipped}")


def _write_batch(
    dataset: ImageDataset, indices: range, tokenizer: ImageTokenizer, writer: ShardWriter
) -> None:
    # A corrupt image's substitute is encoded in its own turn, under its own key.
    samples = [s for s in (dataset.read(i) for i in indices) if s is not None]
    if not samples:
        return
    images_BCHW = torch.stack([sample.image_CHW for sample in samples]).float() / 255
    codes_BN = tokenizer.encode(images_BCHW).cpu().numpy().astype(np.uint16)
    for sample, codes_N in zip(samples, codes_BN, strict=True):
        buffer = io.BytesIO()
        np.save(buffer, codes_N, allow_pickle=False)
        files = {
            "npy": buffer.getvalue(),
            "txt": sample.caption.encode(),
            "json": json.dumps({"source": sample.key}).encode(),
        }
        writer.write(sample.key, files)


def _refuse_other(out: str, meta: dict[str, Any]) -> None:
    found = ShardIndex.load(out).meta
    if found != meta:
        same = found.get("image_tokenizer") == meta["image_tokenizer"]
        what = "images" if same else "image tokenizer"
        raise DataError(
            f"{out}: holds tokens of another {what} ({found.get('image_tokenizer')}, wanted "
            f"{meta['image_tokenizer']}); delete the folder or choose another paths.tokens"
        )
