"""What is in a folder of shards: counts, sizes, caption lengths, a contact sheet."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dalle_dist import storage
from dalle_dist.data.decode import decode_sample
from dalle_dist.data.labelled_grid import grid
from dalle_dist.data.shards import ShardIndex, ShardSet
from dalle_dist.errors import DataError

SHEET = 12  # images per side of a contact sheet
SIZES = 5  # image sizes named, the most frequent first
DAMAGED = "cannot be decoded"


def inspect(folder: str, contact_sheet: Path | None) -> None:
    """Print what `folder`, or its train/ and held-out/ parts, hold; verify every sha256.

    The contact sheet shows up to 144 images, evenly spread, each below its caption.

    Raises DataError: no shards here, or damaged ones.
    """
    parts = [p for p in ("train", "held-out") if storage.exists(_index(folder, p))]
    for part in parts or [""]:
        place = storage.join(folder, part) if part else folder
        kind = ShardIndex.load(place).kind
        shards = ShardSet(place, kind)
        shards.verify_all()
        _describe(place, shards)
    if contact_sheet is not None:
        _sheet(storage.join(folder, parts[0]) if parts else folder, contact_sheet)


def _index(folder: str, part: str) -> str:
    return storage.join(folder, part, "index.json")


def _describe(folder: str, shards: ShardSet) -> None:
    captions, sizes = [], Counter[str]()
    for sample in map(shards.read, range(len(shards))):
        captions.append(_caption(sample))
        if shards.index.kind == "images":
            sizes[_size(sample)] += 1
    size = sum(info.bytes for info in shards.index.shards)
    print(
        f"{folder}: {len(shards)} {shards.index.kind} in {len(shards.sizes)} shards, {size} bytes"
    )
    print(f"  caption characters  {_range([len(caption) for caption in captions])}")
    print(f"  caption words       {_range([len(caption.split()) for caption in captions])}")
    print(f"  empty captions      {sum(not caption.strip() for caption in captions)}")
    damaged = sizes.pop(DAMAGED, 0)
    for name, count in sizes.most_common(SIZES):
        print(f"  {name:18}  {count} images")
    if len(sizes) > SIZES:
        print(f"  {len(sizes) - SIZES} other sizes")
    if damaged:
        print(f"  {DAMAGED:18}  {damaged} images")


def _caption(sample: dict[str, bytes]) -> str:
    return sample.get("txt", b"").decode(errors="replace")


def _range(numbers: Sequence[int]) -> str:
    ordered = sorted(numbers)
    return f"min {ordered[0]}, median {ordered[len(ordered) // 2]}, max {ordered[-1]}"


def _size(sample: dict[str, bytes]) -> str:
    image = decode_sample(sample)
    return f"{image.width}x{image.height}" if image else DAMAGED


def _sheet(folder: str, path: Path) -> None:
    shards = ShardSet(folder, "images")
    count = min(len(shards), SHEET * SHEET)
    samples = [shards.read(i * len(shards) // count) for i in range(count)]
    chosen = [(decode_sample(sample), _caption(sample)) for sample in samples]
    shown = [(image, caption) for image, caption in chosen if image is not None]
    if not shown:
        raise DataError(f"{folder}: none of its images can be decoded")
    rows = [shown[i : i + SHEET] for i in range(0, len(shown), SHEET)]
    images = [[image for image, _ in row] for row in rows]
    buffer = io.BytesIO()
    grid(images, captions=[[caption for _, caption in row] for row in rows]).save(buffer, "PNG")
    storage.write_bytes(str(path), buffer.getvalue())
    print(f"{path}: contact sheet of {len(shown)} images")
