"""Generated images as files: PNGs, one grid of them, and a manifest; or tar shards.

Of one request, several processes may write the images; one of them, the first, writes what is of
all: manifest and grid, or the shards' index.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence

from PIL import Image, UnidentifiedImageError

from dalle_dist import storage
from dalle_dist.data.labelled_grid import grid
from dalle_dist.errors import UserError
from dalle_dist.generate.generator import GeneratedImage
from dalle_dist.generate.request import Entry

GRID, MANIFEST = "grid.png", "manifest.json"
# Images, and what a call that was cut off has left.
OURS = re.compile(r"[^/]*-\d{2,7}-[0-9a-f]{8}\.png|unfinished/[0-9a-f]{32}(-[0-9a-f]+)?\.npz")
SCORED = ("score", "rank", "scored_by")  # on which an image does not depend
WITHIN_ROW = ("prompt", "index", "seed", *SCORED)  # in which images of one row may differ
ACROSS = 12  # images in a line of the grid
MOST_SHOWN = 400  # images in the grid
# Of the prompt in a file name: file systems take 255 in all, encrypted ones 143, and a file has a
# longer name while it is being written.
SLUG_BYTES = 100


def write_outputs(images: Sequence[GeneratedImage], folder: str) -> None:
    """What `write_images` and `write_manifest` write of all images. Their errors."""
    check_folder(folder)
    write_manifest(folder, write_images(folder, [(image.entry, image.image) for image in images]))


def write_images(folder: str, images: Iterable[tuple[Entry, Image.Image]]) -> dict[str, Entry]:
    """PROMPT-INDEX-DIGEST.png ...; returns the entries by file name, for the manifest.

    The digest is of all that an image depends on: prompt, index, seed, model, precision, sampling,
    and what a completion keeps. So a call that is repeated replaces its own images and no others.
    """
    entries = {}
    for entry, image in images:
        name = _name(entry)
        storage.write_bytes(storage.join(folder, name), png(image))
        entries[name] = entry
    return entries


def write_manifest(folder: str, made: dict[str, Entry]) -> None:
    """grid.png (a row per prompt) and manifest.json, last, of the images of all calls.

    Earlier ones first; of many only the first MOST_SHOWN are in the grid.

    Raises:
        UserError: an earlier image is damaged.
    """
    entries = refuse_foreign(folder) | made
    shown = dict(list(entries.items())[:MOST_SHOWN])
    images = {name: _read(folder, name) for name in shown}
    storage.write_bytes(storage.join(folder, GRID), png(_grid(shown, images)))
    listed = [{"file": name, **entry} for name, entry in entries.items()]
    text = json.dumps({"images": listed}, indent=1, ensure_ascii=False) + "\n"
    storage.write_bytes(storage.join(folder, MANIFEST), text.encode())


def check_folder(folder: str) -> None:
    """Raise UserError when images cannot be added to a folder.

    It holds something else, or an earlier image that is to be in the grid is damaged.
    """
    for name in list(refuse_foreign(folder))[:MOST_SHOWN]:
        _read(folder, name)


def refuse_foreign(folder: str) -> dict[str, Entry]:
    """Raise UserError when `folder` holds what is neither a generated image nor lists them.

    Returns what the manifest says of each file that is still there; nothing when the folder is
    empty or absent.
    """
    files = storage.list_files(folder)
    entries = _entries(folder) if MANIFEST in files else {}
    ours = entries.keys() | ({GRID, MANIFEST} if entries else set())
    foreign = [name for name in files if name not in ours and not OURS.fullmatch(name)]
    if foreign:
        raise UserError(
            f"{folder}: holds {foreign[0]}, which is not a generated image; choose another --out"
        )
    return {name: entry for name, entry in entries.items() if name in files}


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _entries(folder: str) -> dict[str, Entry]:
    """A manifest's images by file name; nothing when it is some other program's manifest."""
    try:
        tree = json.loads(storage.read_bytes(storage.join(folder, MANIFEST)))
        return {entry.pop("file"): entry for entry in tree["images"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _name(entry: Entry) -> str:
    depends = {name: value for name, value in entry.items() if name not in SCORED}
    digest = hashlib.blake2b(json.dumps(depends, sort_keys=True).encode(), digest_size=4)
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
    parts = [
        p for p in dict.fromkeys(p for e in entries.values() for p in e) if p not in WITHIN_ROW
    ]
    rows: dict[tuple[str, ...], list[Image.Image]] = {}
    for name, entry in entries.items():
        key = (str(entry["prompt"]), *(str(entry.get(part, "unknown")) for part in parts))
        rows.setdefault(key, []).append(shown[name])
    lines, captions = [], []
    differing = [i for i, values in enumerate(zip(*rows, strict=True)) if i and len({*values}) > 1]
    for key, images in rows.items():
        notes = ", ".join(f"{parts[i - 1]} {key[i]}" for i in differing)
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
