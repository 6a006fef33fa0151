"""Images out of what a client sent: of few formats, and not before their size is known."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image, ImageOps

from dalle_dist.data.decode import on_white
from dalle_dist.serve.limits import Refusal

FORMATS = ("PNG", "JPEG", "WEBP")


def image_of(name: str, text: Any, most_pixels: int) -> Image.Image:
    """The image of a base64 text, upright and in RGB.

    Raises:
        Refusal: not base64, another format, too many pixels, or damaged.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        raise Refusal(400, f"{name}: is not base64") from None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # Opening reads the header alone; decoding is what a bomb waits for.
            if image.width * image.height > most_pixels:
                raise _too_large(name, most_pixels)
            ImageOps.exif_transpose(image, in_place=True)
            return on_white(image)
    except Refusal:
        raise
    except Image.DecompressionBombError:
        raise _too_large(name, most_pixels) from None
    except Exception:  # Pillow's plugins raise half a dozen unrelated classes on damaged files
        raise Refusal(400, f"{name}: is not a PNG, JPEG or WebP that can be decoded") from None


def _too_large(name: str, most_pixels: int) -> Refusal:
    return Refusal(413, f"{name}: has more than {most_pixels / 1e6:g} million pixels")
