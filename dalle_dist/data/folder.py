"""A folder of NAME.{jpg,png,webp} + NAME.txt to image shards."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dalle_dist.data import storage
from dalle_dist.data.shards import ShardWriter
from dalle_dist.errors import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")


def build_folder(folder: str, out: str, size: int | None, seed: int, held_out: float) -> None:
    """Write OUT/train and OUT/held-out; pictures shrunk to `size` on the shorter side, if given.

    Corrupt pictures, and those without a caption, are counted, named and skipped. Which pictures
    are held out depends on (seed, name) alone.

    Raises:
        DataError: no pictures, none of them usable, or OUT holds shards already.
    """
    root = storage_root(folder)
    pictures = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not pictures:
        raise DataError(f"{folder}: no pictures (NAME.jpg, .png or .webp) in this folder")
    parts: dict[str, list[Path]] = {"train": [], "held-out": []}
    for path in pictures:
        parts["held-out" if _share(path, root, seed) < held_out else "train"].append(path)
    counts = {part: _write_part(root, out, part, paths, size) for part, paths in parts.items()}
    if not sum(counts.values()):
        raise DataError(f"{folder}: none of {len(pictures)} pictures can be used")
    print(f"{out}: {counts['train']} pictures to train on, {counts['held-out']} held out")


def storage_root(folder: str) -> Path:
    """Local folder of a path, downloaded when remote. Raises DataError when absent."""
    if storage.is_remote(folder):
        files = [storage.fetch(storage.join(folder, n)) for n in storage.list_files(folder)]
        return _link(files, folder)
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder")
    return Path(folder)


def _link(files: list[Path], folder: str) -> Path:
    """The cached objects under their own names, since pictures and captions pair by name."""
    digest = hashlib.sha256(folder.encode()).hexdigest()[:16]
    root = storage.cache_folder() / "folders" / digest
    for file, name in zip(files, storage.list_files(folder), strict=True):
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(file)
    return root


def _write_part(root: Path, out: str, part: str, paths: list[Path], size: int | None) -> int:
    samples = _samples(root, paths, size)
    first = next(samples, None)
    if first is None:
        return 0
    count = 1
    with ShardWriter(storage.join(out, part), "images", {"source": root.name}) as writer:
        writer.write(*first)
        for key, files in samples:
            writer.write(key, files)
            count += 1
    return count


def _samples(
    root: Path, paths: list[Path], size: int | None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for path in paths:
        caption = path.with_suffix(".txt")
        text = caption.read_text(errors="replace").strip() if caption.is_file() else ""
        if not text:
            print(f"skipped {path}: no caption in {caption.name}")
            continue
        picture = _encode(path, size)
        if picture is None:
            print(f"skipped {path}: cannot be decoded")
            continue
        extension, data, (width, height) = picture
        name = str(path.relative_to(root).with_suffix(""))
        about = {"source": str(path.relative_to(root)), "width": width, "height": height}
        files = {extension: data, "txt": text.encode(), "json": json.dumps(about).encode()}
        # WebDataset splits names at the first dot and treats slashes as folders.
        yield name.replace("/", "__").replace(".", "_"), files


def _encode(path: Path, size: int | None) -> tuple[str, bytes, tuple[int, int]] | None:
    try:
        with Image.open(path) as image:
            image.load()
            if size is None or min(image.size) <= size:
                extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}.get(image.format or "")
                return (extension, path.read_bytes(), image.size) if extension else None
            scale = size / min(image.size)
            small = image.convert("RGB").resize(
                (round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX
            )
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return None
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return "png", buffer.getvalue(), small.size


def _share(path: Path, root: Path, seed: int) -> float:
    """A number in [0, 1) that depends on (seed, name) alone."""
    name = f"{seed} {path.relative_to(root).with_suffix('')}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
