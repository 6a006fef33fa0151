"""Tensors to images, and images to grids with captions."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 6  # pixels between images
LINES = 3  # of a caption, at most
TEXT, LEADING = 11, 14  # pixels: size of a caption's letters, and from line to line
BELOW = 3  # pixels between a caption and its image
LEAST_WIDTH = 240  # pixels of a grid with captions: that of a single image is read as well
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def to_image(image_CHW: Tensor) -> Image.Image:
    """Floats in [0, 1] (clamped) to an RGB image."""
    pixels_HWC = (image_CHW.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels_HWC.cpu().numpy())


def grid(
    rows: Sequence[Sequence[Image.Image]],
    cell: int = 96,
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Rows of images, each fitted into a square of `cell` pixels, on white.

    `captions` are for each row either one, over its whole width, or one per image. They stand
    above the images, in at most three lines; an empty one is left out.

    Raises:
        ValueError: neither one caption for a row nor one per image.
    """
    step = cell + GAP
    width = max(len(row) for row in rows) * step + GAP
    if captions:
        width = max(width, LEAST_WIDTH)
    texts = captions or [[""]] * len(rows)
    heads = [_head(row, above, cell, width) for row, above in zip(rows, texts, strict=True)]
    most = [max((len(lines) for lines in head), default=0) for head in heads]
    tops = [lines * LEADING + GAP + BELOW if lines else 0 for lines in most]
    canvas = Image.new("RGB", (width, len(rows) * step + GAP + sum(tops)), "white")
    draw, y = ImageDraw.Draw(canvas), GAP
    for row, head, top in zip(rows, heads, tops, strict=True):
        for j, lines in enumerate(head):
            _write(draw, lines, GAP + j * step, y + top)
        for j, image in enumerate(row):
            canvas.paste(fit(image, cell), (GAP + j * step, y + top))
        y += top + step
    return canvas


def fit(image: Image.Image, cell: int) -> Image.Image:
    return image.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC)


@cache
def font(size: int = TEXT) -> Font:
    """Matplotlib's own DejaVu Sans: Pillow's default font has hardly a letter beyond ASCII.

    `size` is that of the letters, in pixels.
    """
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, size) if path.exists() else ImageFont.load_default(size)


def wrapped(text: str, width: int, size: int = TEXT) -> list[str]:
    """At most LINES lines of at most `width` pixels in `font(size)`, the last cut by an ellipsis.

    Lines are broken at spaces, or within a word that is too long for one.
    """
    rest, lines = _printable(text[: LINES * width]), list[str]()
    while rest:
        count = _fitting(rest, width, size)
        if count < len(rest) and len(lines) == LINES - 1:
            return [*lines, rest[: _fitting(rest, width, size, "…")].rstrip() + "…"]
        if count < len(rest):
            space = rest.rfind(" ", 0, count + 1)
            count = space if space > 0 else count
        lines.append(rest[:count])
        rest = rest[count:].lstrip()
    return lines


def _head(
    row: Sequence[Image.Image], texts: Sequence[str], cell: int, width: int
) -> list[list[str]]:
    """The lines above each image; above the first alone where one caption is for the row."""
    if len(texts) not in (1, len(row)):
        raise ValueError(f"captions: {len(texts)} for a row of {len(row)} images")
    return [wrapped(text, width - 2 * GAP if len(texts) == 1 else cell) for text in texts]


def _write(draw: ImageDraw.ImageDraw, lines: list[str], left: int, bottom: int) -> None:
    for number, line in enumerate(reversed(lines), 1):
        draw.text((left, bottom - BELOW - number * LEADING), line, fill="black", font=font())


def _fitting(text: str, width: int, size: int, end: str = "") -> int:
    """How many letters of `text`, with `end` after them, are at most `width` pixels; at least 1."""
    counts = range(1, len(text) + 1)
    return bisect_right(counts, width, key=lambda n: _pixels(text[:n] + end, size)) or 1


def _pixels(text: str, size: int = TEXT) -> int:
    return math.ceil(font(size).getlength(text))


def _printable(text: str) -> str:
    """One line without control characters, for which a font has at best an empty box."""
    return " ".join("".join(c for c in word if c.isprintable()) for word in text.split()).strip()
