"""Generated pictures as files: PNGs, one grid of them, and a manifest."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence

from PIL import Image

from dalle_dist.data import storage
from dalle_dist.data.pictures import grid
from dalle_dist.errors import UserError
from dalle_dist.generate.generator import GeneratedImage

MANIFEST = "manifest.json"


def write_outputs(images: Sequence[GeneratedImage], folder: str, *, fingerprint: str) -> None:
    """PROMPT-00.png ..., grid.png (a row per prompt) and manifest.json, last.

    Pictures of an earlier call may be overwritten; any other non-empty folder is refused.

    Raises:
        UserError: the folder holds something that is not generated pictures.
    """
    refuse_foreign(folder)
    prompts = list(dict.fromkeys(image.prompt for image in images))
    entries = []
    for image in images:
        name = f"{prompts.index(image.prompt):02d}-{_slug(image.prompt)}-{image.index:02d}.png"
        storage.write_bytes(storage.join(folder, name), _png(image.image))
        entries.append({"file": name, "prompt": image.prompt, "seed": image.seed})
    rows = [[image.image for image in images if image.prompt == prompt] for prompt in prompts]
    storage.write_bytes(storage.join(folder, "grid.png"), _png(grid(rows)))
    manifest = {"model": fingerprint, "pictures": entries}
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    storage.write_bytes(storage.join(folder, MANIFEST), text.encode())


def refuse_foreign(folder: str) -> None:
    """Raise UserError when `folder` holds files, but no manifest of generated pictures."""
    files = storage.list_files(folder)
    if files and MANIFEST not in files:
        raise UserError(f"{folder}: not empty and not generated pictures; choose another --out")


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "prompt"


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
