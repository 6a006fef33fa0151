"""Several crops of each image of a shard, for the tokens of stage 2."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dalle_dist.data.augment import Augmentation, centre
from dalle_dist.data.decode import decode_sample
from dalle_dist.data.shards import ShardSet

# Paper, Listing 2: the first square lies within the middle quarter of the slack, and is resized to
# at most 9/8 of the image's size.
SLACK, CROP_MAX = (3 / 8, 5 / 8), 9 / 8


@dataclass(frozen=True)
class Crops:
    """How an image is cut: crop 0 is the centred square, the others depend on (seed, key, crop).

    Args:
        count: crops of an image.
        flip: crops but the first are mirrored with probability 1/2, text in them too.
    """

    size: int
    count: int
    flip: bool
    seed: int

    def cut(self, image: Image.Image, key: str) -> list[Image.Image]:
        """size x size each."""
        random_ = Augmentation(self.size, 1.0, CROP_MAX, flip=False, slack=SLACK)
        found = [centre(image, self.size)]
        for crop in range(1, self.count):
            image_ = random_(image, self._seed(key, crop))
            if self._flipped(key, crop):
                image_ = image_.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            found.append(image_)
        return found

    def name(self, key: str, crop: int) -> str:
        """What a crop is, in words."""
        if not crop:
            return "centre"
        return f"random {crop}" + " flipped" * self._flipped(key, crop)

    def _flipped(self, key: str, crop: int) -> bool:
        return self.flip and random.Random(f"flip {self._seed(key, crop)}").random() < 0.5

    def _seed(self, key: str, crop: int) -> str:
        return f"{self.seed} {crop} {key}"


class CutImage(NamedTuple):
    """`crops_KCHW`: uint8; None where the image cannot be decoded."""

    key: str
    caption: bytes
    crops_KCHW: Tensor | None


class ImageCrops(Dataset):
    """The images of one shard, cut."""

    def __init__(self, images: ShardSet, shard: int, crops: Crops) -> None:
        self._images, self._shard, self._crops = images, shard, crops

    def __len__(self) -> int:
        return int(self._images.sizes[self._shard])

    def __getitem__(self, number: int) -> CutImage:
        files = self._images.read_at(self._shard, number)
        key, caption = files["__key__"].decode(), files.get("txt", b"")
        image = decode_sample(files)
        if image is None:
            return CutImage(key, caption, None)
        crops_KHWC = np.stack([np.array(crop) for crop in self._crops.cut(image, key)])
        return CutImage(key, caption, torch.from_numpy(crops_KHWC).permute(0, 3, 1, 2))
