"""From any picture to a square of fixed size: for training with random crops, else centred."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Augmentation:
    """The dVAE's augmentation (paper, Listing 1), with its bounds as multiples of `size`.

    A picture too small for the bounds is enlarged within them: the paper's pictures never are.
    """

    size: int
    crop_min: float
    crop_max: float
    flip: bool

    def __call__(self, image: Image.Image, seed: str) -> Image.Image:
        """A size x size picture; the same for the same `seed`."""
        generator = random.Random(seed)
        side = min(image.size)
        image = _crop(image, side, generator.random(), generator.random())
        low, high = round(self.crop_min * self.size), round(self.crop_max * self.size)
        side = generator.randint(low, max(low, high if side < low else min(side, high)))
        image = image.resize((side, side), Image.Resampling.BOX)
        image = _crop(image, self.size, generator.random(), generator.random())
        if self.flip and generator.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


def centre(image: Image.Image, size: int) -> Image.Image:
    """The centred square of a picture, area-averaged to size x size."""
    square = _crop(image, min(image.size), 0.5, 0.5)
    return square if square.width == size else square.resize((size, size), Image.Resampling.BOX)


def _crop(image: Image.Image, side: int, x: float, y: float) -> Image.Image:
    if image.size == (side, side):
        return image
    left, top = round(x * (image.width - side)), round(y * (image.height - side))
    return image.crop((left, top, left + side, top + side))
