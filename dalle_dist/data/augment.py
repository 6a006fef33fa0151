"""From any image to a square of fixed size: for training with random crops, else centred."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Augmentation:
    """The dVAE's augmentation (paper, Listing 1), with its bounds as multiples of `size`.

    The first, largest square lies within `slack`, as shares, of what the longer side has too much.

    An image no larger than the lower bound is enlarged into the bounds, so that its crop moves
    too; in the paper, where images are larger, it would stay as it is.
    """

    size: int
    crop_min: float
    crop_max: float
    flip: bool
    slack: tuple[float, float] = (0.0, 1.0)

    def __call__(self, image: Image.Image, seed: str) -> Image.Image:
        """A size x size image; the same for the same `seed`."""
        generator = random.Random(seed)
        side = min(image.size)
        x, y = (generator.uniform(*self.slack) for _ in range(2))
        image = _crop(image, side, x, y)
        low, high = round(self.crop_min * self.size), round(self.crop_max * self.size)
        side = generator.randint(low, high if side <= low else min(side, high))
        image = _resized_part(image, side, self.size, generator.random(), generator.random())
        if self.flip and generator.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


def centre(image: Image.Image, size: int) -> Image.Image:
    """The centred square of an image, area-averaged to size x size."""
    square = _crop(image, min(image.size), 0.5, 0.5)
    return _resized_part(square, size, size, 0.0, 0.0)


def _resized_part(square: Image.Image, side: int, size: int, x: float, y: float) -> Image.Image:
    """The size x size part at (x, y) of the square resized to side x side.

    Of what is cut off nothing is computed. Where a pixel's middle lies on the border between two
    areas, it counts to that to which float64's rounding takes it.
    """
    if square.width == side:
        return _crop(square, size, x, y)
    # A box of less than one pixel would repeat pixels.
    filter_ = Image.Resampling.BOX if side < square.width else Image.Resampling.BICUBIC
    left, top = int(x * (side - size + 1)), int(y * (side - size + 1))
    scale = square.width / side
    # Rounding may take an end beyond the square.
    right, bottom = (min((start + size) * scale, square.width) for start in (left, top))
    return square.resize((size, size), filter_, (left * scale, top * scale, right, bottom))


def _crop(image: Image.Image, side: int, x: float, y: float) -> Image.Image:
    if image.size == (side, side):
        return image
    left, top = int(x * (image.width - side + 1)), int(y * (image.height - side + 1))
    return image.crop((left, top, left + side, top + side))
