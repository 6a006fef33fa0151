"""Pairs of images side by side, the similarity and both captions beside each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageOps

from dalle_dist.data.labelled_grid import GAP, font, wrapped

CELL, BESIDE, APART = 112, 150, 24  # pixels: an image, the text before it, from pair to pair
VALUE, TEXT, LEADING = 16, 11, 3  # pixels: size of letters, and between lines
ACROSS = 3  # pairs in a row
WIDTH, HEIGHT = BESIDE + 2 * (CELL + GAP) + APART, CELL + GAP


@dataclass(frozen=True)
class ShownPair:
    """An evaluated image, the training image nearest to it, their captions, their similarity."""

    similarity: float
    images: tuple[Image.Image, Image.Image]
    captions: tuple[str, str]


def drawn(pairs: Sequence[ShownPair]) -> Image.Image:
    """In rows, to be read like text."""
    canvas = Image.new("RGB", (ACROSS * WIDTH, -(-len(pairs) // ACROSS) * HEIGHT + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for i, pair in enumerate(pairs):
        left, top = (i % ACROSS) * WIDTH + GAP, i // ACROSS * HEIGHT + GAP
        draw.text((left, top), f"{pair.similarity:.4f}", fill="black", font=font(VALUE))
        _write(draw, pair.captions, left, top + VALUE + 2 * LEADING)
        for j, image in enumerate(pair.images):
            # Not stretched: a copy often has another shape, which should be seen as it is.
            cell = ImageOps.pad(image, (CELL, CELL), color="white")
            canvas.paste(cell, (left + BESIDE + j * (CELL + GAP), top))
    return canvas


def _write(draw: ImageDraw.ImageDraw, captions: tuple[str, str], left: int, top: int) -> None:
    """The evaluated image's caption, below it in grey that of the training image."""
    for caption, fill in zip(captions, ("black", "dimgray"), strict=True):
        for line in wrapped(caption, BESIDE - 2 * GAP, TEXT):
            draw.text((left, top), line, fill=fill, font=font(TEXT))
            top += TEXT + LEADING
        top += LEADING
