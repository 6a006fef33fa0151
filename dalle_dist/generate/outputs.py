"""Generated images as files: PNGs, one grid of them, and a manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

from PIL import Image, UnidentifiedImageError

from dalle_dist.data import storage
from dalle_dist.data.labelled_grid import grid
from dalle_dist.errors import UserError
from dalle_dist.generate.generator import GeneratedImage
from dalle_dist.generate.sampling_options import Sampling

GRID, MANIFEST = "grid.png", "manifest.json"
# What tells rows of one prompt apart.
SETTINGS = ("model", *(option.name for option in dataclasses.fields(Sampling)))
ACROSS = 12  # images in a line of the grid
# Of the prompt in a file name: file systems take 255 in all, encrypted ones 143, and a file has a
# longer name while it is being written.
SLUG_BYTES = 100
Entry = dict[str, Any]


def write_outputs(images: Sequence[GeneratedImage], folder: str, *, fingerprint: str) -> None:
    """PROMPT-INDEX-DIGEST.png ..., grid.png (a row per prompt) and manifest.json, last.

    The digest is of all that an image depends on: prompt, index, seed, model and sampling. So a
    call that is repeated replaces its own images and no others; grid and manifest show those of
    all calls, earlier ones first. A folder that holds anything else is refused.

    Raises:
        UserError: the folder holds something that is not generated images.
    """
    entries = refuse_foreign(folder)
    made: dict[str, Image.Image] = {}
    for image in images:
        entry = _entry(image, fingerprint)
        made[_name(entry)] = image.image
        entries[_name(entry)] = entry
    # Before anything is written: an earlier image may be damaged.
    shown = {name: made.get(name) or _read(folder, name) for name in entries}
    for name, png in made.items():
        storage.write_bytes(storage.join(folder, name), _png(png))
    storage.write_bytes(storage.join(folder, GRID), _png(_grid(entries, shown)))
    listed = [{"file": name, **entry} for name, entry in entries.items()]
    text = json.dumps({"images": listed}, indent=1, ensure_ascii=False) + "\n"
    storage.write_bytes(storage.join(folder, MANIFEST), text.encode())


def refuse_foreign(folder: str) -> dict[str, Entry]:
    """Raise UserError when `folder` holds anything that its manifest does not list as an image.

    Returns what the manifest says of each file that is still there; nothing when the folder is
    empty or absent.
    """
    files = storage.list_files(folder)
    entries = _entries(folder) if MANIFEST in files else {}
    ours = entries.keys() | ({GRID, MANIFEST} if entries else set())
    foreign = [name for name in files if name not in ours]
    if foreign:
        raise UserError(
            f"{folder}: holds {foreign[0]}, which is not a generated image; choose another --out"
        )
    return {name: entry for name, entry in entries.items() if name in files}


def _entries(folder: str) -> dict[str, Entry]:
    """A manifest's images by file name; nothing when it is some other program's manifest."""
    try:
        tree = json.loads(storage.read_bytes(storage.join(folder, MANIFEST)))
        return {entry.pop("file"): entry for entry in tree["images"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _entry(image: GeneratedImage, fingerprint: str) -> Entry:
    return {
        "prompt": image.prompt,
        "index": image.index,
        "seed": image.seed,
        "model": fingerprint,
        **dataclasses.asdict(image.sampling),
    }


def _name(entry: Entry) -> str:
    digest = hashlib.blake2b(json.dumps(entry, sort_keys=True).encode(), digest_size=4)
    return f"{_slug(entry['prompt'])}-{entry['index']:02d}-{digest.hexdigest()}.png"


def _slug(prompt: str) -> str:
    """The prompt's letters, marks and digits of any script, as far as a file name takes them."""
    text = unicodedata.normalize("NFC", prompt.lower())
    # \w of regular expressions leaves out the vowel signs of Indian scripts.
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    slug = "-".join(word for word in kept.split() if any(c.isalnum() for c in word))
    slug = slug.encode(sys.getfilesystemencoding(), errors="ignore")[:SLUG_BYTES].decode(
        sys.getfilesystemencoding(), errors="ignore"
    )
    return slug.strip("-") or "prompt"


def _grid(entries: dict[str, Entry], shown: dict[str, Image.Image]) -> Image.Image:
    """A row, or more where they are many, for the images of one prompt by the same settings."""
    rows: dict[tuple[str, ...], list[Image.Image]] = {}
    for name, entry in entries.items():
        key = tuple(str(entry.get(part, "unknown")) for part in ("prompt", *SETTINGS))
        rows.setdefault(key, []).append(shown[name])
    lines, captions = [], []
    differing = [i for i, values in enumerate(zip(*rows, strict=True)) if i and len({*values}) > 1]
    for key, images in rows.items():
        notes = ", ".join(f"{SETTINGS[i - 1]} {key[i]}" for i in differing)
        for start in range(0, len(images), ACROSS):
            lines.append(images[start : start + ACROSS])
            captions.append([f"{key[0]} ({notes})" if notes else key[0]] if not start else [""])
    return grid(lines, captions=captions)


def _read(folder: str, name: str) -> Image.Image:
    path = storage.join(folder, name)
    try:
        with Image.open(io.BytesIO(storage.read_bytes(path))) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError):
        raise UserError(f"{path}: is not a whole image; remove it") from None


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
