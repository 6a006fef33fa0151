"""Images of a set, each below its caption, as one picture."""

from __future__ import annotations

import io

import numpy as np

from dalle_dist import storage
from dalle_dist.data.decode import decode_sample
from dalle_dist.data.labelled_grid import grid
from dalle_dist.data.shards import ShardSet
from dalle_dist.errors import DataError

SIDE = 12  # images per side; of many shards, each row is of one


def write_contact_sheet(shards: ShardSet, path: str) -> None:
    """Up to 144 images, evenly spread over at most 12 shards.

    Raises:
        DataError: none of them can be decoded.
    """
    samples = [shards.read(i) for i in _spread(shards)]
    chosen = [(decode_sample(s), s.get("txt", b"").decode(errors="replace")) for s in samples]
    shown = [(image, caption) for image, caption in chosen if image is not None]
    if not shown:
        raise DataError(f"{shards.folder}: none of its images can be decoded")
    rows = [shown[i : i + SIDE] for i in range(0, len(shown), SIDE)]
    images = [[image for image, _ in row] for row in rows]
    buffer = io.BytesIO()
    grid(images, captions=[[caption for _, caption in row] for row in rows]).save(buffer, "PNG")
    storage.write_bytes(path, buffer.getvalue())
    unreadable = len(chosen) - len(shown)
    left_out = f"; {unreadable} more cannot be decoded" * bool(unreadable)
    print(f"{path}: contact sheet of {len(shown)} images{left_out}")


def _spread(shards: ShardSet) -> list[int]:
    chosen = shards.evenly(SIDE)
    numbers = np.concatenate([shards.first(i) + np.arange(shards.sizes[i]) for i in chosen])
    count = min(len(numbers), SIDE * SIDE)
    return [int(number) for number in numbers[np.arange(count) * len(numbers) // count]]
