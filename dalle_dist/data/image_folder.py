"""A folder of NAME.{jpg,png,webp} + NAME.txt to image shards."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from dalle_dist.data import storage
from dalle_dist.data.decode import EXTENSIONS, decode
from dalle_dist.data.shards import ShardWriter, refuse_used
from dalle_dist.errors import DataError

Sample = tuple[str, dict[str, bytes]]


def build_folder(folder: str, out: str, size: int | None, seed: int, held_out: float) -> None:
    """Write OUT/train and OUT/held-out; images shrunk to `size` on the shorter side, if given.

    Corrupt images, those without a caption and those whose name another one has are named,
    counted and skipped. Which images are held out depends on (seed, name) alone.

    Raises:
        DataError: no images, none of them usable, none to hold out, or OUT holds shards already.
    """
    if not 0 < held_out < 1 or (size is not None and size < 1):
        raise DataError(f"--held-out {held_out} is not in (0, 1), or --size {size} below 1")
    outs = {part: storage.join(out, part) for part in ("train", "held-out")}
    refuse_used(*outs.values())
    root = storage.fetch_folder(folder)
    found = sorted(p for p in root.rglob("*") if p.suffix.lower().lstrip(".") in EXTENSIONS)
    if not found:
        raise DataError(f"{folder}: no images (NAME.jpg, .png or .webp) in this folder")
    shares = {path: _share(_key(root, path), seed) for path in found}
    # A small folder has at least one image to hold out.
    most = max(held_out, min(shares.values()))
    parts = {
        "train": [path for path in found if shares[path] > most],
        "held-out": [path for path in found if shares[path] <= most],
    }
    skipped: Counter[str] = Counter()
    counts = {p: _write_part(root, outs[p], paths, size, skipped) for p, paths in parts.items()}
    _conclude(folder, out, outs, counts, skipped)


def _conclude(
    folder: str, out: str, outs: dict[str, str], counts: dict[str, int], skipped: Counter[str]
) -> None:
    why = "".join(f"; {count} skipped: {reason}" for reason, count in skipped.items())
    if not all(counts.values()):
        for part in outs.values():
            _remove_shards(part)
        usable = sum(counts.values())
        fix = "choose another --held-out or --seed" if usable > 1 else "add images"
        raise DataError(
            f"{folder}: {usable} images can be used, {counts['train']} to train on and "
            f"{counts['held-out']} to hold out{why}; {fix}"
        )
    print(f"{out}: {counts['train']} images to train on, {counts['held-out']} held out{why}")


def _remove_shards(folder: str) -> None:
    """Index first, so that the rest is never taken for whole."""
    for name in sorted(storage.list_files(folder), key=lambda name: name not in storage.LAST):
        storage.remove(storage.join(folder, name))


def _write_part(
    root: Path, out: str, paths: list[Path], size: int | None, skipped: Counter[str]
) -> int:
    samples = _samples(root, paths, size, skipped)
    first = next(samples, None)
    if first is None:
        return 0
    count = 1
    with ShardWriter(out, "images", {"source": root.name, "size": size}) as writer:
        writer.write(*first)
        for key, files in samples:
            writer.write(key, files)
            count += 1
    return count


def _samples(
    root: Path, paths: list[Path], size: int | None, skipped: Counter[str]
) -> Iterator[Sample]:
    keys: set[str] = set()
    for path in paths:
        sample = _sample(root, path, size, keys)
        if isinstance(sample, str):
            skipped[sample] += 1
            print(f"skipped {path.relative_to(root)}: {sample}")
        else:
            keys.add(sample[0])
            yield sample


def _sample(root: Path, path: Path, size: int | None, keys: set[str]) -> Sample | str:
    """Key and files of an image, or why there are none."""
    key = _key(root, path)
    if key in keys:
        return "another image has this name"
    beside = path.with_suffix(".txt")
    caption = beside.read_text("utf-8", "replace").strip() if beside.is_file() else ""
    if not caption:
        return "no caption"
    data = path.read_bytes()
    image = decode(data)
    if image is None:
        return "cannot be decoded"
    extension = path.suffix.lower().lstrip(".").replace("jpeg", "jpg")
    if size is not None and min(image.size) > size:
        image = _shrink(image, size)
        extension, data = "png", _png(image)
    about = {"source": str(path.relative_to(root)), "width": image.width, "height": image.height}
    return key, {extension: data, "txt": caption.encode(), "json": json.dumps(about).encode()}


def _shrink(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    return image.resize(shape, Image.Resampling.BOX)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _key(root: Path, path: Path) -> str:
    """WebDataset splits names at the first dot and takes slashes for folders."""
    return str(path.relative_to(root).with_suffix("")).replace("/", "__").replace(".", "_")


def _share(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on (seed, key) alone."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
