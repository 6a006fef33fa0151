"""A folder of NAME.{jpg,png,webp} + NAME.txt to image shards."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dalle_dist import storage
from dalle_dist.data.decode import EXTENSIONS
from dalle_dist.data.shards import refuse_used
from dalle_dist.data.write_parts import PARTS, Captioned, write_parts
from dalle_dist.errors import DataError


def build_folder(folder: str, out: str, size: int | None, seed: int, held_out: float) -> None:
    """`write_parts` of a folder's images, and its errors.

    Which images are held out depends on (seed, name) alone.

    Raises:
        DataError: no images, none of them usable, none to hold out, or OUT holds shards already.
    """
    if not 0 < held_out < 1 or (size is not None and size < 1):
        raise DataError(f"--held-out {held_out} is not in (0, 1), or --size {size} below 1")
    refuse_used(*(storage.join(out, part) for part in PARTS))
    root = storage.fetch_folder(folder)
    found = sorted(p for p in root.rglob("*") if p.suffix.lower().lstrip(".") in EXTENSIONS)
    if not found:
        raise DataError(f"{folder}: no images (NAME.jpg, .png or .webp) in this folder")
    shares = {path: share(_key(root, path), seed) for path in found}
    # A small folder has at least one image to hold out.
    most = max(held_out, min(shares.values()))
    parts = {
        "train": [_captioned(root, path) for path in found if shares[path] > most],
        "held-out": [_captioned(root, path) for path in found if shares[path] <= most],
    }
    write_parts(folder, out, parts, size, "choose another --held-out or --seed")


def _captioned(root: Path, path: Path) -> Captioned:
    beside = path.with_suffix(".txt")
    caption = beside.read_text("utf-8", "replace").strip() if beside.is_file() else ""
    return Captioned(_key(root, path), path, caption, str(path.relative_to(root)))


def _key(root: Path, path: Path) -> str:
    """WebDataset splits names at the first dot and takes slashes for folders."""
    return str(path.relative_to(root).with_suffix("")).replace("/", "__").replace(".", "_")


def share(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on (seed, key) alone."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
