"""How images are prepared, and how far the blur is from a Gaussian."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_dist.errors import ConfigError
from dalle_dist.evaluation.blur import RADII, blur
from dalle_dist.evaluation.prepare import FILTERS, Preparation, stack, unstack


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_the_square_is_cropped_first_and_an_image_of_the_size_is_left():
    image = noise(20, 11)
    assert np.array_equal(Preparation(11)(image), np.asarray(image)[:, 4:15])
    assert np.array_equal(
        Preparation(11)(image.rotate(90, expand=True)),
        np.asarray(image.rotate(90, expand=True))[4:15],
    )
    expected = image.crop((4, 0, 15, 11)).resize((5, 5), Image.Resampling.LANCZOS)
    assert np.array_equal(Preparation(5, filter="lanczos")(image), expected)
    stretched = Preparation(8, "none", "box")(image)
    assert np.array_equal(stretched, image.resize((8, 8), Image.Resampling.BOX))
    same = noise(8, 8)
    assert np.array_equal(Preparation(8)(same), same)


def test_filters_differ_and_transparency_is_white():
    image = noise(40, 40)
    found = {np.asarray(Preparation(16, filter=name)(image)).tobytes() for name in FILTERS}
    assert len(found) == len(FILTERS)
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(Preparation(2)(clear)).min() == 255


def test_json_and_what_is_refused():
    preparation = Preparation(64, "none", "lanczos")
    assert Preparation.from_json(preparation.to_json()) == preparation
    assert preparation.to_json() == '{"crop": "none", "filter": "lanczos", "size": 64}'
    for text in ("{", '{"size": 3, "colour": 1}', "[]"):
        with pytest.raises(ConfigError, match="is no preparation"):
            Preparation.from_json(text)
    with pytest.raises(ConfigError, match="filter=nearest: one of box"):
        Preparation(filter="nearest")
    with pytest.raises(ConfigError, match="crop=left"):
        Preparation(crop="left")
    with pytest.raises(ConfigError, match="size=0"):
        Preparation(0)


def test_images_are_stacked_and_back():
    images = [noise(5, 4, seed) for seed in range(3)]
    stacked = stack(images)
    assert stacked.shape == (3, 3, 4, 5) and stacked.dtype == torch.uint8
    assert stacked[1, 2, 3, 4] == np.asarray(images[1])[3, 4, 2]
    assert all(np.array_equal(a, b) for a, b in zip(images, unstack(stacked), strict=True))


def gaussian_blur(pixels_HWC, radius):
    """By its definition, edge pixels repeated outwards."""
    reach = math.ceil(6 * radius)
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * radius**2))
    for axis in (0, 1):
        width = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(pixels_HWC, width, mode="edge")
        count = pixels_HWC.shape[axis]
        pixels_HWC = sum(
            w * np.take(padded, range(k, k + count), axis=axis)
            for k, w in enumerate(weights / weights.sum())
        )
    return pixels_HWC


@pytest.mark.parametrize("radius", RADII[1:])
def test_the_blur_is_nearly_gaussian(radius):
    y, x = np.mgrid[:96, :96]
    shapes = np.stack([(x // 37 + y // 29) % 2, (x - 40) ** 2 + (y - 50) ** 2 < 900, x < 48], 2)
    pixels = (255 * shapes).astype(np.uint8)
    found = np.asarray(blur(Image.fromarray(pixels), radius)).astype(float)
    inside = slice(2 * radius, -2 * radius)  # Pillow repeats the edge anew before each box filter
    error = (found - gaussian_blur(1.0 * pixels, radius))[inside, inside]
    assert abs(error).max() < 5
    assert np.sqrt((error**2).mean()) < 2
    wider = (found - gaussian_blur(1.0 * pixels, 1.25 * radius))[inside, inside]
    assert abs(wider).max() > 6, "the radius is the standard deviation"


def test_no_blur_leaves_the_image():
    image = noise(9, 9)
    assert blur(image, 0) is image
