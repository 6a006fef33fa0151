"""The paper's sketch experiment in small (3.3, Fig. 2d): an emoji above, the same below in a style.

An emoji is half as wide as its image, so that both halves show it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from PIL import Image, ImageFilter, ImageOps

Style = Callable[[Image.Image], Image.Image]


def _outline(image: Image.Image) -> Image.Image:
    return image.convert("L").filter(ImageFilter.SMOOTH_MORE).filter(ImageFilter.CONTOUR)


def _tinted(image: Image.Image) -> Image.Image:
    return ImageOps.colorize(image.convert("L"), black="navy", white="white", mid="dodgerblue")


# By the word that the caption has for it. What is done to a square on white, and stays one.
STYLES: dict[str, Style] = {
    "grey": ImageOps.grayscale,
    "outlined": _outline,
    "flipped": ImageOps.flip,
    "blue": _tinted,
}


def pairs(square: Image.Image, name: str, size: int) -> Iterator[tuple[str, Image.Image, str]]:
    """(style, image of size x size, caption) of an emoji's image, in each style."""
    for style, apply in STYLES.items():
        image = Image.new("RGB", (size, size), "white")
        for top, part in ((0, square), (size // 2, apply(square))):
            small = part.convert("RGB").resize((size // 2, size // 2), Image.Resampling.LANCZOS)
            image.paste(small, (size // 4, top))
        yield style, image, f"the exact same {name} on the top as a {style} {name} on the bottom"
