"""Between the stages: the codes of every image, computed once (paper 2.2).

Each shard of images becomes a shard of tokens by itself, so that any number of processes share the
work and one that was cut off goes on (`data/shard_job.py`).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dalle_dist import storage
from dalle_dist.config import Config
from dalle_dist.data.crops import Crops, ImageCrops
from dalle_dist.data.shard_job import Job, Note, Record, Sample
from dalle_dist.data.shards import INDEX, ShardIndex, ShardSet
from dalle_dist.distributed import process_group
from dalle_dist.distributed.launchers import read_environment
from dalle_dist.errors import DataError
from dalle_dist.image_tokenizer.protocol import ImageTokenizer
from dalle_dist.image_tokenizer.registry import load_configured
from dalle_dist.train.encode_preview import write_preview

PARTS = ("train", "held-out")
BATCH = 64  # images in one call of the tokenizer


def encode(
    config: Config, share: tuple[int, int] = (0, 1), crops: int = 1, flip: bool = False
) -> None:
    """Image shards to token shards, for the training and the held-out part.

    Args:
        share: (i, n): this call makes the i-th of n parts of the shards; its ranks, if a launcher
            started several, share them out once more.
        crops: of each training image: the centred square, and random ones (paper, Listing 2).
        flip: the random ones are mirrored with probability 1/2.

    Raises:
        ConfigError: the image tokenizer's shape is not the config's, or a GPU was granted that
            torch does not see.
        DataError: no shards, nothing readable, or the output holds another tokenizer's tokens.
    """
    info = read_environment(os.environ)
    tokenizer = load_configured(config, process_group.device_of(info.local_rank))
    mine = (share[0] * info.world + info.rank, share[1] * info.world)
    for part in PARTS:
        cut = Crops(tokenizer.image_size, crops if part == "train" else 1, flip, config.seed)
        _encode_part(config, tokenizer, part, cut, mine)


def _encode_part(
    config: Config, tokenizer: ImageTokenizer, part: str, crops: Crops, share: tuple[int, int]
) -> None:
    source, out = (storage.join(p, part) for p in (config.paths.images, config.paths.tokens))
    images = ShardSet(source, "images")
    meta = _meta(tokenizer, images.index, crops)
    if storage.exists(storage.join(out, INDEX)):
        _refuse_other(out, meta)
        if share[0] == 0:
            print(f"{out}: already encoded by {tokenizer.fingerprint}; nothing to do")
        return
    shards = range(len(images.index.shards))
    units = [_Shard(images, shard, tokenizer, crops, config.data.workers) for shard in shards]
    job = Job(out, "tokens", meta, units, plan=[])
    job.open()
    for unit in tqdm(job.missing(share), desc=f"encode {part}", unit="shard"):
        job.make(unit)
    said = list[str]()
    if not job.finish(lambda records: said.append(_summary(records, source))):
        print(f"{out}: this process' shards are done, others are not yet")
    elif said:  # this process found that all are there
        print(f"{out}: {said[0]}; {write_preview(config, tokenizer, part)}")


def _meta(tokenizer: ImageTokenizer, source: ShardIndex, crops: Crops) -> dict[str, Any]:
    captions = source.meta.get("captions")
    return {
        "image_tokenizer": tokenizer.fingerprint,
        "grid": tokenizer.grid,
        "codebook_size": tokenizer.codebook_size,
        "source": source.fingerprint,
        "crops": crops.count,
        "flip": crops.flip,
        **({"captions": captions} if captions else {}),
    }


@dataclass(frozen=True)
class _Shard:
    """A unit of the job: one shard of images."""

    images: ShardSet
    shard: int
    tokenizer: ImageTokenizer
    crops: Crops
    workers: int
    part: str = ""

    @property
    def name(self) -> str:
        return f"{self.shard:05d}"

    def samples(self, note: Note) -> Iterator[Sample]:
        note["corrupt"] = []
        loader = DataLoader(
            ImageCrops(self.images, self.shard, self.crops),
            batch_size=max(1, BATCH // self.crops.count),
            num_workers=self.workers,
            collate_fn=list,
        )
        for batch in loader:
            note["corrupt"] += [sample.key for sample in batch if sample.crops_KCHW is None]
            found = [sample for sample in batch if sample.crops_KCHW is not None]
            if found:
                codes = self._codes(torch.stack([sample.crops_KCHW for sample in found]))
                for sample, codes_KN in zip(found, codes, strict=True):
                    yield sample.key, self._files(sample.key, sample.caption, codes_KN)

    def _codes(self, images_BKCHW: Tensor) -> np.ndarray:
        codes = self.tokenizer.encode(images_BKCHW.flatten(0, 1).float() / 255)
        return codes.view(*images_BKCHW.shape[:2], -1).cpu().numpy().astype(np.uint16)

    def _files(self, key: str, caption: bytes, codes_KN: np.ndarray) -> dict[str, bytes]:
        buffer = io.BytesIO()
        np.save(buffer, codes_KN if self.crops.count > 1 else codes_KN[0], allow_pickle=False)
        about = {
            "source": key,
            "image_tokenizer": self.tokenizer.fingerprint,
            "crops": [self.crops.name(key, crop) for crop in range(self.crops.count)],
        }
        return {"npy": buffer.getvalue(), "txt": caption, "json": json.dumps(about).encode()}


def _summary(records: list[Record], source: str) -> str:
    images = sum(record.shard.samples for record in records if record.shard)
    corrupt = sum(len(record.note["corrupt"]) for record in records)
    if not images:
        raise DataError(f"{source}: none of {corrupt} images can be decoded")
    return f"{images} images" + f", {corrupt} corrupt images skipped" * bool(corrupt)


def _refuse_other(out: str, meta: dict[str, Any]) -> None:
    found = ShardIndex.load(out).meta
    if found == meta:
        return
    if found.get("image_tokenizer") != meta["image_tokenizer"]:
        what = "image tokenizer"
    else:
        what = "images" if found.get("source") != meta["source"] else "crops"
    raise DataError(
        f"{out}: holds tokens of another {what} ({found.get('image_tokenizer')}, wanted "
        f"{meta['image_tokenizer']}); delete the folder or choose another paths.tokens"
    )
