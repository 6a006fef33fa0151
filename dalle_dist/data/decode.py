"""Image files to RGB images as a viewer shows them, or the reason why not.

What cannot be decoded is counted by whoever reads: nothing here raises.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
from dataclasses import dataclass
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageFile, PngImagePlugin

from dalle_dist.data.colour import in_srgb

EXTENSIONS = ("png", "jpg", "jpeg", "webp")  # of the images among the members of a shard
MOST_PIXELS = 1_000_000_000
NOT_A_PICTURE = "not a picture"
# What Pillow opens beside pictures: documents, films, and data that needs other programs.
NO_PICTURES = ("PDF", "EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "FITS", "IPTC", "MCIDAS")
USUAL = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
SIGNATURES = (b"\xff\xd8\xff", PngImagePlugin._MAGIC, b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"BM")
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = [turn for orientation, turn in TURNS.items() if orientation >= 5]
# Keys of `Image.info` without which there is no EXIF to look into.
EXIF_KEYS = frozenset(("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"))

# Of odd metadata, which costs nothing here.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Pillow's own limit warns at 89 megapixels and refuses at 179; `MOST_PIXELS` is ours.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class Picture:
    """A decoded file.

    Attributes:
        image: upright, in sRGB, on white where it is transparent.
        format: Pillow's name of the file's format, e.g. "JPEG".
        usual: extension under which the file's own bytes are readable anywhere, for an 8-bit JPEG,
            PNG or WebP of one frame; None for all others.
    """

    image: Image.Image
    format: str
    usual: str | None


def decode(data: bytes) -> Image.Image | None:
    """The image upright, in sRGB, on white where it is transparent; None when it is damaged."""
    image = decode_or_reason(data)
    return None if isinstance(image, str) else image


def decode_or_reason(data: bytes) -> Image.Image | str:
    """`decode`'s image, or why there is none, as `read_picture` says it."""
    picture = read_picture(data)
    return picture if isinstance(picture, str) else picture.image


def decode_sample(files: dict[str, bytes]) -> Image.Image | None:
    """The image among a sample's files."""
    return decode(next((files[e] for e in EXTENSIONS if e in files), b""))


def read_picture(data: bytes) -> Picture | str:
    """A file's picture, or why there is none.

    The reason is "not a picture", "too large: W x H pixels" or "damaged: DETAIL".
    """
    try:
        return _read(data)
    except MemoryError:
        return "too large: more than this machine's memory holds"
    except Exception as error:  # Pillow's plugins raise half a dozen unrelated classes
        bare = _without_text(data)
        if len(bare) == len(data):
            return _reason(data, error)
    try:
        found = _read(bare)
    except Exception as error:
        return _reason(data, error)
    return found if isinstance(found, str) else Picture(found.image, found.format, None)


def size_of(file: IO[bytes]) -> tuple[int, int] | None:
    """(width, height) as a viewer shows it, from a file's head; None where it is no picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=formats()) as opened:
                sideways = _turn(opened) in SIDEWAYS
                return (opened.height, opened.width) if sideways else opened.size
        except Exception:
            return None


def on_white(image: Image.Image) -> Image.Image:
    """In RGB, white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are pictures, the usual ones first: each is tried."""
    Image.init()
    found = (name for name in Image.ID if name not in NO_PICTURES)
    return tuple(sorted(found, key=lambda name: name not in USUAL))


@functools.cache
def picture_extensions() -> frozenset[str]:
    """Extensions of files that this Pillow opens as pictures, in lower case, without a dot."""
    Image.init()
    registered = Image.registered_extensions().items()
    return frozenset(end[1:] for end, name in registered if name in {*formats(), "MPO"})


def _read(data: bytes) -> Picture | str:
    with Image.open(io.BytesIO(data), formats=formats()) as opened:
        if opened.width * opened.height > MOST_PIXELS:
            return f"too large: {opened.width} x {opened.height} pixels"
        usual = _usual(opened)
        opened.load()
        return Picture(_shown(opened), opened.format or "", usual)


def _usual(opened: ImageFile.ImageFile) -> str | None:
    # A camera's JPEG with a preview behind it is a MPO of two frames, and a JPEG to any reader.
    animated = getattr(opened, "is_animated", False) and opened.format != "MPO"
    return None if animated or opened.mode not in EIGHT_BITS else USUAL.get(opened.format or "")


def _shown(opened: ImageFile.ImageFile) -> Image.Image:
    turn = _turn(opened)
    image = opened if opened.mode in EIGHT_BITS else _in_eight_bits(opened)
    if "icc_profile" in opened.info:
        image = in_srgb(image, opened.info["icc_profile"])
    image = image if image.mode == "RGB" and "transparency" not in image.info else on_white(image)
    return image if turn is None else image.transpose(turn)


def _turn(opened: ImageFile.ImageFile) -> Image.Transpose | None:
    if opened.format == "TIFF" or EXIF_KEYS.isdisjoint(opened.info):
        return None  # Pillow turns a TIFF when it loads it
    try:
        return TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken block raises whatever its parser runs into
        return None


def _in_eight_bits(opened: Image.Image) -> Image.Image:
    """Shades of more than 8 bits scaled to 0..255, where Pillow would cut them off at 255."""
    if opened.mode not in ("I", "F") and not opened.mode.startswith("I;"):
        return opened
    shades = np.nan_to_num(np.asarray(opened).astype(np.float32))
    scaled = np.clip(np.rint(shades * (255 / _white(opened, shades))), 0, 255).astype(np.uint8)
    clear = opened.info.get("transparency")
    if isinstance(clear, int):
        scaled[shades == clear] = 255
    return Image.fromarray(scaled)


def _white(opened: Image.Image, shades: np.ndarray) -> float:
    """Which value is white: the format's, else the least usual one that no shade exceeds."""
    if opened.mode.startswith("I;") or opened.format == "PPM":
        return 65535
    most = float(shades.max())
    usual = (1.0, 255.0, 65535.0) if opened.mode == "F" else (255.0, 65535.0)
    return next((white for white in usual if most <= white), most)


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "damaged: the file is empty"
    if not isinstance(error, Image.UnidentifiedImageError):
        return f"damaged: {' '.join(str(error).split()) or type(error).__name__}"
    return "damaged: its head cannot be read" if data.startswith(SIGNATURES) else NOT_A_PICTURE


def _without_text(data: bytes) -> bytes:
    """A PNG without its text, which Pillow refuses when there is much; other files as they are."""
    start = len(PngImagePlugin._MAGIC)
    if data[:start] != PngImagePlugin._MAGIC:
        return data
    kept = [data[:start]]
    while start < len(data):
        head = data[start : start + 8]
        size = 12 + struct.unpack(">I", head[:4])[0] if len(head) == 8 else len(head)
        if head[4:] not in TEXT_CHUNKS:
            kept.append(data[start : start + size])
        start += size
    return b"".join(kept)
