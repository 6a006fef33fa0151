"""Image files with captions to the two parts of a data set; what cannot be used is counted."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dalle_dist import storage
from dalle_dist.data.decode import decode
from dalle_dist.data.shards import ShardWriter, refuse_used
from dalle_dist.errors import DataError

PARTS = ("train", "held-out")
Sample = tuple[str, dict[str, bytes]]


@dataclass(frozen=True)
class Captioned:
    """An image file and its caption, "" if there is none; `name` says where it comes from."""

    key: str
    path: Path
    caption: str
    name: str


def write_parts(
    source: str, out: str, parts: Mapping[str, Sequence[Captioned]], size: int | None, fix: str
) -> None:
    """Write OUT/train and OUT/held-out; images shrunk to `size` on the shorter side, if given.

    Corrupt images, those without a caption and those whose key another one has are named, counted
    and skipped.

    Args:
        source: what the images are from, for messages and the index.
        fix: what helps when one of the parts is empty.

    Raises:
        DataError: a part has no image that can be used, or OUT holds shards already.
    """
    outs = {part: storage.join(out, part) for part in PARTS}
    refuse_used(*outs.values())
    skipped: Counter[str] = Counter()
    counts = {p: _write_part(source, outs[p], parts[p], size, skipped) for p in PARTS}
    _conclude(source, out, outs, counts, skipped, fix)


def _conclude(
    source: str,
    out: str,
    outs: dict[str, str],
    counts: dict[str, int],
    skipped: Counter[str],
    fix: str,
) -> None:
    why = "".join(f"; {count} skipped: {reason}" for reason, count in skipped.items())
    if not all(counts.values()):
        for part in outs.values():
            _remove_shards(part)
        usable = sum(counts.values())
        raise DataError(
            f"{source}: {usable} images can be used, {counts['train']} to train on and "
            f"{counts['held-out']} to hold out{why}; {fix if usable > 1 else 'add images'}"
        )
    print(f"{out}: {counts['train']} images to train on, {counts['held-out']} held out{why}")


def _remove_shards(folder: str) -> None:
    """Index first, so that the rest is never taken for whole."""
    for name in sorted(storage.list_files(folder), key=lambda name: name not in storage.LAST):
        storage.remove(storage.join(folder, name))


def _write_part(
    source: str, out: str, images: Sequence[Captioned], size: int | None, skipped: Counter[str]
) -> int:
    samples = _samples(images, size, skipped)
    first = next(samples, None)
    if first is None:
        return 0
    count = 1
    with ShardWriter(out, "images", {"source": Path(source).name, "size": size}) as writer:
        writer.write(*first)
        for key, files in samples:
            writer.write(key, files)
            count += 1
    return count


def _samples(
    images: Sequence[Captioned], size: int | None, skipped: Counter[str]
) -> Iterator[Sample]:
    keys: set[str] = set()
    for image in images:
        sample = "another image has this name" if image.key in keys else _sample(image, size)
        if isinstance(sample, str):
            skipped[sample] += 1
            print(f"skipped {image.name}: {sample}")
        else:
            keys.add(sample[0])
            yield sample


def _sample(captioned: Captioned, size: int | None) -> Sample | str:
    """Key and files of an image, or why there are none."""
    if not captioned.caption:
        return "no caption"
    data = captioned.path.read_bytes()
    image = decode(data)
    if image is None:
        return "cannot be decoded"
    extension = captioned.path.suffix.lower().lstrip(".").replace("jpeg", "jpg")
    if size is not None and min(image.size) > size:
        image = _shrink(image, size)
        extension, data = "png", _png(image)
    about = {"source": captioned.name, "width": image.width, "height": image.height}
    files = {extension: data, "txt": captioned.caption.encode(), "json": json.dumps(about).encode()}
    return captioned.key, files


def _shrink(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    return image.resize(shape, Image.Resampling.BOX)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
