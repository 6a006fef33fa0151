"""Images with captions of a folder of image shards: the samples of stage 1 and of `train-clip`.

Shape suffixes: B batch, C colour channels, H and W pixels.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_dist.data.augment import Augmentation, centre
from dalle_dist.data.decode import decode_sample
from dalle_dist.data.loader import Samples
from dalle_dist.data.order import Place, SampleOrder
from dalle_dist.data.slots import empty
from dalle_dist.data.source import SampleSource, SourceDataset
from dalle_dist.errors import DataError

CACHE_BYTES = 256 << 20  # decoded images kept per process, for data sets that fit
PIXEL_BYTES = 4  # as Pillow stores RGB


@dataclass(frozen=True)
class ImageSample:
    key: str
    caption: str
    image: Image.Image  # RGB, of the data set's image size
    position: int

    @property
    def image_CHW(self) -> Tensor:
        """uint8, channels last in memory."""
        return torch.from_numpy(np.array(self.image)).permute(2, 0, 1)


@dataclass(frozen=True)
class ImageBatch:
    keys: list[str]
    captions: list[str]
    image_BCHW: Tensor  # uint8, channels last in memory
    positions: Tensor  # int64

    def pin_memory(self) -> ImageBatch:
        """The same in memory that a GPU copies from without waiting; `DataLoader` asks for it."""
        return ImageBatch(
            self.keys, self.captions, self.image_BCHW.pin_memory(), self.positions.pin_memory()
        )


class ImageDataset(SourceDataset):
    """Images of a folder of image shards; with an order, by position in the endless stream.

    An image that cannot be decoded is noted, named once in a warning, and replaced by the next
    readable one. Raises DataError when none can be decoded.
    """

    def __init__(
        self,
        folder: str,
        order: SampleOrder | None,
        image_size: int,
        augment: Augmentation | None,
        seed: int,
        bad_shards: int = 0,
    ) -> None:
        self.source, self.image_size = SampleSource(folder, "images", order, bad_shards), image_size
        self.augment, self.seed = augment, seed
        self._decoded: dict[tuple[int, int], tuple[str, str, Image.Image]] = {}
        self._warned: set[str] = set()
        self._room = CACHE_BYTES

    @property
    def corrupt(self) -> int:
        """Images that this process has found undecodable."""
        return len(self._warned)

    def __getitem__(self, position: int) -> ImageSample:
        place = self.source.reading(position)
        for candidate in itertools.chain([place], self.source.others(place)):
            sample = self._sample(candidate, position)
            if sample is not None:
                return sample
        raise DataError(f"{self.shards.folder}: none of {len(self)} images can be decoded")

    def read(self, index: int) -> ImageSample | None:
        """Sample `index` of all, or None when its image cannot be decoded."""
        return self._sample(Place(0, *self.shards.place(index)), -1)

    def _sample(self, place: Place, position: int) -> ImageSample | None:
        decoded = self._decode(place)
        if decoded is None:
            return None
        key, caption, image = decoded
        seed = f"{self.seed} {place.epoch} {self.source.index(place)}"
        if self.augment is None:
            image = centre(image, self.image_size)
        else:
            image = self.augment(image, seed)
        return ImageSample(key, self.source.caption(caption, seed), image, position)

    def _decode(self, place: Place) -> tuple[str, str, Image.Image] | None:
        known = place.shard, place.number
        if known in self._decoded:
            return self._decoded[known]
        files = self.source.read(place)
        key, caption = files["__key__"].decode(), files.get("txt", b"").decode(errors="replace")
        image = decode_sample(files)
        if image is None:
            self._corrupt(key)
            return None
        decoded = (key, caption, image)
        size = PIXEL_BYTES * image.width * image.height
        # Of a set that does not fit, what is kept would hardly be asked for again.
        if size <= self._room and size * len(self) <= CACHE_BYTES:
            self._room -= size
            self._decoded[known] = decoded
        return decoded

    def _corrupt(self, key: str) -> None:
        self.notes.corrupt.add(key)
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(f"{self.shards.folder}: {key} cannot be decoded, skipped", stacklevel=3)


def collate_images(samples: Samples[ImageSample]) -> ImageBatch:
    """One batch. Each image is copied into it while it is in the processor's cache."""
    keys, captions, positions = list[str](), list[str](), list[int]()
    rows_BHWC = torch.empty(0)
    for i, sample in enumerate(samples):
        row_HWC = np.asarray(sample.image)
        if not i:
            rows_BHWC = empty((len(samples), *row_HWC.shape), torch.uint8)
        rows_BHWC.numpy()[i] = row_HWC
        keys.append(sample.key)
        captions.append(sample.caption)
        positions.append(sample.position)
    return ImageBatch(keys, captions, rows_BHWC.permute(0, 3, 1, 2), torch.tensor(positions))
