"""The rows of a report's table: captions, and what was generated for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_dist.errors import DataError
from dalle_dist.generate.generator import GeneratedImage, Generator
from dalle_dist.report.figures import Row
from dalle_dist.report.inputs import HeldOut, TrainingImages

CAPTIONS, SAMPLES = 24, 4
CHOICE = (
    "evenly spread over the held-out set in its order; neither a seed nor what was generated has a "
    "part in the choice"
)


def chosen_captions(captions: Sequence[str]) -> list[int]:
    """Indices of at most CAPTIONS captions by the rule CHOICE; empty captions are passed over.

    Raises DataError: all are empty.
    """
    told = [i for i, caption in enumerate(captions) if caption.strip()]
    if not told:
        raise DataError("a report needs held-out captions, and all of them are empty")
    count = min(CAPTIONS, len(told))
    return [told[k * len(told) // count] for k in range(count)]


def generate_samples(
    generator: Generator, captions: list[str], seed: int
) -> list[list[Image.Image]]:
    """SAMPLES images of each caption, by the release's sampling options."""
    made: list[GeneratedImage] = generator.generate(captions, n=SAMPLES, seed=seed)
    images = [sample.image for sample in made]
    return [images[start : start + SAMPLES] for start in range(0, len(images), SAMPLES)]


def rows_of(
    held_out: HeldOut,
    chosen: Sequence[int],
    samples: Sequence[list[Image.Image]],
    train: TrainingImages,
    nearest_B: Sequence[int],
) -> list[Row]:
    """One row for each chosen caption; `nearest_B` numbers images of `train`, as it gave them."""
    rows = []
    for i, images, number in zip(chosen, samples, nearest_B, strict=True):
        learnt = train.sample(number)
        true = byte_image(held_out.images_BCHW[i])
        row = Row(held_out.captions[i], true, learnt.image, learnt.caption, images)
        rows.append(row)
    return rows


def byte_image(image_CHW: Tensor) -> Image.Image:
    """A uint8 tensor to an RGB image."""
    return Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())


def first_samples(samples: Sequence[Sequence[Image.Image]]) -> Tensor:
    """The first image of each row: images_BCHW, uint8."""
    pixels = [torch.from_numpy(np.array(images[0])) for images in samples]
    return torch.stack(pixels).permute(0, 3, 1, 2)
