"""Generated images as tar shards: `KEY.png KEY.txt KEY.json`, which any of our commands reads.

The keys are PROMPT-RANK in numbers; the json is what a manifest says of an image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from dalle_dist import storage
from dalle_dist.data.shards import INDEX, ShardIndex, ShardInfo, write_index, write_shard
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import UserError
from dalle_dist.generate.outputs import png
from dalle_dist.generate.request import Entry, Request

# Shards, and what a call that was cut off has left.
OURS = re.compile(
    r"\d{5,}\.(tar|samples\.parquet)|\.partial-.*|unfinished/[0-9a-f]{32}(-[0-9a-f]+)?\.npz"
)
PER_SHARD = 1_000  # images, at least those of one prompt
Images = Callable[[int], list[tuple[Entry, Image.Image]]]  # of the prompt with a number


def refuse_other_shards(folder: str) -> None:
    """Raises UserError: the folder holds anything but shards of images, finished or not."""
    for name in storage.list_files(folder):
        if name != INDEX and not OURS.fullmatch(name):
            raise UserError(
                f"{folder}: holds {name}, which is not a shard of generated images; choose another "
                "--out"
            )
    if storage.exists(storage.join(folder, INDEX)):
        raise UserError(f"{folder}: holds shards already; delete it or choose another --out")


def write_shards(
    folder: str, request: Request, keep: int, images: Images, ranks: Ranks
) -> list[ShardInfo]:
    """This rank's part of the shards."""
    found = []
    each = max(1, PER_SHARD // keep)
    starts = range(0, len(request.prompts), each)
    for shard in range(ranks.rank, len(starts), ranks.world):
        prompts = range(starts[shard], min(starts[shard] + each, len(request.prompts)))
        found.append(write_shard(folder, f"{shard:05d}.tar", _samples(prompts, images)))
    return found


def write_shard_index(
    folder: str, request: Request, keep: int, shards: Sequence[ShardInfo]
) -> None:
    """What makes the shards count, with all that their images have in common."""
    common: dict[str, Any] = request.settings.entry("", 0)
    del common["prompt"], common["index"]
    meta = {"generated": common | {"candidates": request.candidates, "keep": keep}}
    in_order = sorted(shards, key=lambda shard: shard.name)
    write_index(folder, "images", meta, in_order)
    ShardIndex.load(folder)


def _samples(prompts: range, images: Images) -> Iterator[tuple[str, dict[str, bytes]]]:
    for prompt in prompts:
        for rank, (entry, image) in enumerate(images(prompt)):
            files = {
                "png": png(image),
                "txt": entry["prompt"].encode(),
                "json": json.dumps(entry, ensure_ascii=False).encode(),
            }
            yield f"{prompt:08d}-{rank:05d}", files
