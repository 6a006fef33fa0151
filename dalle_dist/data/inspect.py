"""What is in a folder of shards: counts, sizes, caption lengths, a contact sheet."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dalle_dist.data import storage
from dalle_dist.data.loader import IMAGE_EXTENSIONS
from dalle_dist.data.pictures import grid
from dalle_dist.data.shards import ShardIndex, ShardSet
from dalle_dist.errors import DataError

SHEET = 12  # pictures per side of a contact sheet


def inspect(folder: str, contact_sheet: Path | None) -> None:
    """Print what `folder`, or its train/ and held-out/ parts, hold; verify every sha256.

    Raises DataError: no shards here, or damaged ones.
    """
    parts = [p for p in ("train", "held-out") if storage.exists(_index(folder, p))]
    for part in parts or [""]:
        place = storage.join(folder, part) if part else folder
        kind = ShardIndex.load(place).kind
        shards = ShardSet(place, kind)
        shards.verify()
        _describe(place, shards)
    if contact_sheet is not None:
        _sheet(storage.join(folder, parts[0]) if parts else folder, contact_sheet)


def _index(folder: str, part: str) -> str:
    return storage.join(folder, part, "index.json")


def _describe(folder: str, shards: ShardSet) -> None:
    samples = [shards.read(i) for i in range(len(shards))]
    captions = [sample.get("txt", b"").decode() for sample in samples]
    size = sum(info.bytes for info in shards.index.shards)
    print(
        f"{folder}: {len(shards)} {shards.index.kind} in {len(shards.sizes)} shards, {size} bytes"
    )
    print(f"  caption characters  {_range([len(caption) for caption in captions])}")
    print(f"  caption words       {_range([len(caption.split()) for caption in captions])}")
    if shards.index.kind == "images":
        sizes = Counter(_size(sample) for sample in samples)
        for name, count in sizes.most_common(5):
            print(f"  {name:18}  {count} pictures")


def _range(numbers: Sequence[int]) -> str:
    ordered = sorted(numbers)
    return f"min {ordered[0]}, median {ordered[len(ordered) // 2]}, max {ordered[-1]}"


def _size(sample: dict[str, bytes]) -> str:
    image = _open(sample)
    return f"{image.width}x{image.height}" if image else "cannot be decoded"


def _open(sample: dict[str, bytes]) -> Image.Image | None:
    data = next((sample[e] for e in IMAGE_EXTENSIONS if e in sample), b"")
    try:
        return Image.open(io.BytesIO(data))
    except OSError:
        return None


def _sheet(folder: str, path: Path) -> None:
    shards = ShardSet(folder, "images")
    if shards.index.kind != "images":
        raise DataError(f"{folder}: a contact sheet needs pictures")
    count = min(len(shards), SHEET * SHEET)
    chosen = [_open(shards.read(i * len(shards) // count)) for i in range(count)]
    pictures = [image for image in chosen if image is not None]
    if not pictures:
        raise DataError(f"{folder}: none of its pictures can be decoded")
    rows = [pictures[i : i + SHEET] for i in range(0, len(pictures), SHEET)]
    grid(rows, cell=64).save(path)
    print(f"{path}: contact sheet of {len(pictures)} pictures")
