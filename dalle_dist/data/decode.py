"""Image files to RGB images, or None: what cannot be decoded is counted by whoever reads."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

EXTENSIONS = ("png", "jpg", "jpeg", "webp")  # of the members of a shard, and of files in a folder


def decode(data: bytes) -> Image.Image | None:
    """The image upright, in RGB, on white where it is transparent; None when it is damaged."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return on_white(ImageOps.exif_transpose(image))
    except Exception:  # Pillow's plugins raise half a dozen unrelated classes on damaged files
        return None


def decode_sample(files: dict[str, bytes]) -> Image.Image | None:
    """The image among a sample's files."""
    return decode(next((files[e] for e in EXTENSIONS if e in files), b""))


def on_white(image: Image.Image) -> Image.Image:
    """In RGB, white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
