"""Images with a colour profile of their own to sRGB, by Little CMS."""

from __future__ import annotations

import functools
import io

from PIL import Image, ImageCms

# A profile's colour space, as ICC names it, to the mode of the images that it is for.
MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}


def in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The image in RGB or RGBA by its profile; as it is where that is sRGB, broken, or another's.

    Args:
        profile: content of an ICC profile, as embedded in an image file.
    """
    clear = image.has_transparency_data
    plain = image.convert("RGBA" if clear else "RGB") if image.mode in ("P", "PA") else image
    alpha = plain.convert("RGBA").getchannel("A") if clear else None
    bare = plain.convert("L" if plain.mode in ("L", "LA") else "RGB") if clear else plain
    transform = _to_srgb(profile, bare.mode)
    if transform is None:
        return image
    converted = ImageCms.applyTransform(bare, transform)
    if converted is None:
        return image
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@functools.lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where nothing is to be done, or nothing can be."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if MODES.get(own.profile.xcolor_space) != mode:
            return None
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(own).lower():
            return None
        return ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
