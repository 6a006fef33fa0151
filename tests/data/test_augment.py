import io
import random

import numpy as np
import pytest
from PIL import Image

from dalle_dist.data.augment import Augmentation, centre
from dalle_dist.data.decode import decode


def _ramp(width, height):
    """Red tells the column, green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)[None, :]
    pixels[..., 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(64, 64), (20, 50), (200, 120), (32, 31)])
def test_any_picture_becomes_a_square_of_the_size(size):
    for seed in range(20):
        assert Augmentation(32, 9 / 8, 12 / 8, True)(_ramp(*size), str(seed)).size == (32, 32)
    assert centre(_ramp(*size), 32).size == (32, 32)


def test_the_seed_decides_and_nothing_else():
    augment = Augmentation(32, 9 / 8, 12 / 8, True)
    images = [augment(_ramp(100, 80), str(seed)).tobytes() for seed in range(20)]
    assert images == [augment(_ramp(100, 80), str(seed)).tobytes() for seed in range(20)]
    assert len(set(images)) == 20


def test_half_of_the_pictures_are_flipped_and_none_without_flip():
    for flip, share in ((True, 0.5), (False, 0.0)):
        augment = Augmentation(32, 9 / 8, 12 / 8, flip)
        images = [np.asarray(augment(_ramp(100, 80), str(s))).astype(int) for s in range(400)]
        flipped = np.mean([pixels[0, 0, 0] > pixels[0, -1, 0] for pixels in images])
        assert abs(flipped - share) <= 4 * (share * (1 - share) / 400) ** 0.5


def test_the_side_before_the_last_crop_is_uniform_within_listing_1s_bounds():
    """The crop spans 32 of t pixels that show 96 columns: t = 96 * 32 / columns seen."""
    augment = Augmentation(32, 9 / 8, 12 / 8, False)
    sides = []
    for seed in range(600):
        row = np.asarray(augment(_ramp(96, 96), str(seed))).astype(float)[0, :, 0]
        sides.append(96 * 31 / (row[-1] - row[0]))
    assert 35.5 < min(sides) < 36.6 and 47.4 < max(sides) < 48.6
    assert abs(np.mean(sides) - 42) < 0.6


def test_a_picture_between_the_bounds_is_never_enlarged():
    """min(side, high) of Listing 1: at most 40 pixels are made of 40."""
    augment = Augmentation(32, 9 / 8, 12 / 8, False)
    spans = [np.ptp(np.asarray(augment(_ramp(40, 40), str(s)))[0, :, 0]) for s in range(200)]
    assert min(spans) == 31
    assert max(spans) > 33


def test_a_picture_of_the_final_size_still_moves():
    augment = Augmentation(32, 1.0, 1.2, False)
    images = {augment(_ramp(32, 32), str(seed)).tobytes() for seed in range(50)}
    assert len(images) > 20


def _undecided(pixels, side):
    """Of `side` areas over `pixels`, those with a border in the middle of a pixel: [side]."""
    twice = 2 * pixels * np.arange(side + 1)
    middle = (twice % side == 0) & (twice // side % 2 == 1)
    return middle[:-1] | middle[1:]


@pytest.mark.parametrize("pixels", [20, 32, 40, 61, 150])
def test_pixels_are_those_of_a_picture_resized_whole_and_then_cut(pixels):
    augment = Augmentation(32, 9 / 8, 12 / 8, False)
    noise = np.random.default_rng(0).integers(0, 255, (pixels, pixels, 3), np.uint8)
    picture, compared = Image.fromarray(noise), 0
    for seed in range(100):
        generator = random.Random(str(seed))
        generator.random(), generator.random()  # of the square in it
        side = generator.randint(36, 48 if pixels <= 36 else min(pixels, 48))
        x, y = (int(generator.random() * (side - 32 + 1)) for _ in range(2))
        filter_ = Image.Resampling.BICUBIC if side > pixels else Image.Resampling.BOX
        wanted = np.asarray(picture.resize((side, side), filter_)).astype(int)
        far = np.abs(np.asarray(augment(picture, str(seed))) - wanted[y : y + 32, x : x + 32])
        decided = np.full(side, True) if side >= pixels else ~_undecided(pixels, side)
        far = far[decided[y : y + 32]][:, decided[x : x + 32]]
        assert far.max() <= 2, (seed, side)
        compared += far.size
    assert compared > 100 * 32 * 32


def test_the_centre_is_the_centre():
    pixels = np.asarray(centre(_ramp(60, 20), 20))
    assert pixels[0, :, 0].tolist() == list(range(20, 40))
    assert pixels[:, 0, 1].tolist() == list(range(20))
    halved = np.asarray(centre(_ramp(40, 40), 20)).astype(int)
    assert halved[0, :, 0].tolist() == [2 * i + 1 for i in range(20)]  # mean, rounded up


def test_transparent_pictures_lie_on_white_and_damaged_ones_are_none(image):
    clear = image((0, 0, 0, 0), mode="RGBA")
    assert decode(clear).getpixel((0, 0)) == (255, 255, 255)
    assert decode(image(128, mode="L")).getpixel((0, 0)) == (128, 128, 128)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, format="PNG")
    for damaged in (b"", b"not an image", buffer.getvalue()[:5000]):
        assert decode(damaged) is None
