"""Between the stages: every picture's codes, computed once; training never runs the dVAE."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dalle_dist.checkpoint.release import DVAERelease, load_dvae
from dalle_dist.config import Config
from dalle_dist.data import storage
from dalle_dist.data.loader import ImageDataset
from dalle_dist.data.shards import ShardIndex, ShardWriter
from dalle_dist.distributed import launch
from dalle_dist.dvae.model import DVAE
from dalle_dist.errors import ConfigError, DataError

PARTS = ("train", "held-out")
BATCH = 64


def encode(config: Config) -> None:
    """Image shards to token shards, for the training and the held-out part.

    Raises:
        ConfigError: the dVAE's shape is not the config's, or a GPU was granted that torch does not
            see.
        DataError: no shards, nothing readable, or the output holds another dVAE's tokens.
    """
    device = launch.device_of()
    release = load_dvae(storage.join(config.paths.dvae_run, "release"), device)
    if release.config.dvae != config.dvae:
        raise ConfigError(
            f"dvae: {config.dvae} is not the shape of {config.paths.dvae_run}: "
            f"{release.config.dvae}"
        )
    for part in PARTS:
        _encode_part(config, release, part, device)


def _encode_part(config: Config, release: DVAERelease, part: str, device: torch.device) -> None:
    source, out = (storage.join(p, part) for p in (config.paths.images, config.paths.tokens))
    meta = {
        "dvae": release.fingerprint,
        "grid": config.dvae.grid,
        "codebook_size": config.dvae.codebook_size,
        "source": [shard.sha256 for shard in ShardIndex.load(source).shards],
    }
    if storage.exists(storage.join(out, "index.json")):
        _refuse_other(out, meta)
        print(f"{out}: already encoded by dVAE {release.fingerprint}; nothing to do")
        return
    dataset = ImageDataset(source, None, config.dvae.image_size, None, config.seed)
    with ShardWriter(out, "tokens", meta) as writer:
        for start in tqdm(range(0, len(dataset), BATCH), desc=f"encode {part}", unit="batch"):
            _write_batch(dataset, range(start, min(start + BATCH, len(dataset))), release, writer)
    skipped = f", {dataset.corrupt} corrupt pictures skipped" if dataset.corrupt else ""
    print(f"{out}: {ShardIndex.load(out).samples} pictures{skipped}")


def _write_batch(
    dataset: ImageDataset, indices: range, release: DVAERelease, writer: ShardWriter
) -> None:
    # A corrupt picture's substitute is encoded in its own turn, under its own key.
    samples = [s for s in (dataset.read(i) for i in indices) if s is not None]
    if not samples:
        return
    device = next(release.dvae.parameters()).device
    images_BCHW = torch.stack([sample.image_CHW for sample in samples]).to(device).float() / 255
    codes_BN = _codes(release.dvae, images_BCHW)
    for sample, codes_N in zip(samples, codes_BN, strict=True):
        buffer = io.BytesIO()
        np.save(buffer, codes_N, allow_pickle=False)
        files = {
            "npy": buffer.getvalue(),
            "txt": sample.caption.encode(),
            "json": json.dumps({"source": sample.key}).encode(),
        }
        writer.write(sample.key, files)


@torch.no_grad()
def _codes(dvae: DVAE, images_BCHW: torch.Tensor) -> np.ndarray[Any, Any]:
    return dvae.codes(images_BCHW).flatten(1).cpu().numpy().astype(np.uint16)


def _refuse_other(out: str, meta: dict[str, Any]) -> None:
    found = ShardIndex.load(out).meta
    if found != meta:
        what = "dVAE" if found.get("dvae") != meta["dvae"] else "pictures"
        raise DataError(
            f"{out}: holds tokens of other {what} (dVAE {found.get('dvae')}, wanted "
            f"{meta['dvae']}); delete the folder or choose another paths.tokens"
        )
