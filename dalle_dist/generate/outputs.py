"""Generated pictures as files: PNGs, one grid of them, and a manifest."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from dalle_dist.data import storage
from dalle_dist.data.pictures import grid
from dalle_dist.errors import UserError
from dalle_dist.generate.generator import GeneratedImage

GRID, MANIFEST = "grid.png", "manifest.json"


def write_outputs(images: Sequence[GeneratedImage], folder: str, *, fingerprint: str) -> None:
    """00-PROMPT-00.png ..., grid.png (a row per prompt) and manifest.json, last.

    Pictures of an earlier call are overwritten where the names are the same, and kept otherwise;
    the grid shows this call's. A folder that holds anything else is refused.

    Raises:
        UserError: the folder holds something that is not generated pictures.
    """
    entries = refuse_foreign(folder)
    prompts = list(dict.fromkeys(image.prompt for image in images))
    for image in images:
        name = f"{prompts.index(image.prompt):02d}-{_slug(image.prompt)}-{image.index:02d}.png"
        storage.write_bytes(storage.join(folder, name), _png(image.image))
        entries[name] = {"prompt": image.prompt, "seed": image.seed, "model": fingerprint}
    rows = [[image.image for image in images if image.prompt == prompt] for prompt in prompts]
    storage.write_bytes(storage.join(folder, GRID), _png(grid(rows)))
    pictures = [{"file": name, **entry} for name, entry in sorted(entries.items())]
    text = json.dumps({"pictures": pictures}, indent=1, ensure_ascii=False) + "\n"
    storage.write_bytes(storage.join(folder, MANIFEST), text.encode())


def refuse_foreign(folder: str) -> dict[str, dict[str, Any]]:
    """Raise UserError when `folder` holds anything that its manifest does not list as a picture.

    Returns what the manifest says of each file; nothing when the folder is empty or absent.
    """
    files = storage.list_files(folder)
    entries = _entries(folder) if MANIFEST in files else {}
    ours = entries.keys() | ({GRID, MANIFEST} if entries else set())
    foreign = [name for name in files if name not in ours]
    if foreign:
        raise UserError(
            f"{folder}: holds {foreign[0]}, which is not a generated picture; choose another --out"
        )
    return entries


def _entries(folder: str) -> dict[str, dict[str, Any]]:
    """A manifest's pictures by file name; nothing when it is some other program's manifest."""
    try:
        tree = json.loads(storage.read_bytes(storage.join(folder, MANIFEST)))
        return {entry.pop("file"): entry for entry in tree["pictures"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "prompt"


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
