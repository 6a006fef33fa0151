"""Images in an order that depends on (seed, position) alone, and the batches of any data set.

Shape suffixes: B batch, C colour channels, H and W pixels.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dalle_dist.data.augment import Augmentation, centre
from dalle_dist.data.decode import decode_sample
from dalle_dist.data.order import SampleOrder
from dalle_dist.data.shards import ShardSet
from dalle_dist.errors import ConfigError, DataError

CACHE_BYTES = 256 << 20  # decoded images kept per process, for data sets that fit


@dataclass(frozen=True)
class ImageSample:
    key: str
    caption: str
    image_CHW: Tensor  # uint8
    position: int


@dataclass(frozen=True)
class ImageBatch:
    keys: list[str]
    captions: list[str]
    image_BCHW: Tensor  # uint8
    positions: Tensor  # int64


class _Marks:
    """A set of sample indices that all loader processes share, so that their counts are one."""

    def __init__(self, samples: int) -> None:
        self._marked = torch.zeros(samples, dtype=torch.bool).share_memory_()

    def add(self, index: int) -> bool:
        """Whether the index was not in the set before."""
        new = not self._marked[index]
        self._marked[index] = True
        return new

    def __len__(self) -> int:
        return int(self._marked.sum())


class ImageDataset(Dataset):
    """Images of a folder of image shards; with an order, by position in the endless stream.

    An image that cannot be decoded is counted, named once in a warning, and replaced by the next
    readable one. Raises DataError when none can be decoded.
    """

    def __init__(
        self,
        folder: str,
        order: SampleOrder | None,
        image_size: int,
        augment: Augmentation | None,
        seed: int,
    ) -> None:
        self.shards, self.order, self.image_size = ShardSet(folder, "images"), order, image_size
        self.augment, self.seed = augment, seed
        self._corrupt = _Marks(len(self.shards))
        self._decoded: dict[int, tuple[str, str, Image.Image]] = {}
        self._room = CACHE_BYTES

    @property
    def corrupt(self) -> int:
        """Images found undecodable so far, by any of the loader's processes."""
        return len(self._corrupt)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, position: int) -> ImageSample:
        epoch, index = self.order.at(position) if self.order else (0, position)
        for step in range(len(self)):
            sample = self.read((index + step) % len(self), epoch, position)
            if sample is not None:
                return sample
        raise DataError(f"{self.shards.folder}: none of {len(self)} images can be decoded")

    def read(self, index: int, epoch: int = 0, position: int = -1) -> ImageSample | None:
        """Sample `index`, or None when its image cannot be decoded."""
        decoded = self._decode(index)
        if decoded is None:
            return None
        key, caption, image = decoded
        if self.augment is None:
            image = centre(image, self.image_size)
        else:
            image = self.augment(image, f"{self.seed} {epoch} {index}")
        pixels_HWC = torch.from_numpy(np.array(image))
        return ImageSample(key, caption, pixels_HWC.permute(2, 0, 1).contiguous(), position)

    def _decode(self, index: int) -> tuple[str, str, Image.Image] | None:
        if index in self._decoded:
            return self._decoded[index]
        files = self.shards.read(index)
        key, caption = files["__key__"].decode(), files.get("txt", b"").decode(errors="replace")
        image = decode_sample(files)
        if image is None:
            if self._corrupt.add(index):
                warnings.warn(
                    f"{self.shards.folder}: {key} cannot be decoded, skipped", stacklevel=2
                )
            return None
        decoded = (key, caption, image)
        size = 3 * image.width * image.height
        if size <= self._room:
            self._room -= size
            self._decoded[index] = decoded
        return decoded


def collate_images(samples: Sequence[ImageSample]) -> ImageBatch:
    return ImageBatch(
        [sample.key for sample in samples],
        [sample.caption for sample in samples],
        torch.stack([sample.image_CHW for sample in samples]),
        torch.tensor([sample.position for sample in samples]),
    )


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    micro_batch: int,
    rank: int,
    world: int,
    start: int,
    workers: int,
    collate: Callable[[Sequence[Any]], Any],
) -> Iterator[Any]:
    """This rank's micro-batches from step `start` (from 0) on, without end.

    Step s takes the positions s * batch_size ... of the stream; its micro-batch a of rank r is
    the r-th run of `micro_batch` positions in the a-th stretch of world * micro_batch. The union
    over ranks is therefore the same for any number of ranks or workers.

    Raises:
        ConfigError: batch_size is not a multiple of world * micro_batch.
    """
    if batch_size % (world * micro_batch):
        raise ConfigError(
            f"batch size {batch_size} is not a multiple of {world} ranks x micro-batch "
            f"{micro_batch} = {world * micro_batch}"
        )
    sampler = _Positions(batch_size, micro_batch, rank, world, start)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
    )
    return _started(loader) if workers else iter(loader)


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator, its workers forked so that they never collect what they inherited.

    A process group that is garbage, or becomes it, waits in its destructor for threads that a
    forked process does not have: the worker would hang, and the run with it.
    """
    gc.collect()
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


class _Positions:
    def __init__(
        self, batch_size: int, micro_batch: int, rank: int, world: int, start: int
    ) -> None:
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.rank, self.world, self.start = rank, world, start

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start
        while True:
            first = step * self.batch_size + self.rank * self.micro_batch
            for stretch in range(0, self.batch_size, self.world * self.micro_batch):
                yield [first + stretch + i for i in range(self.micro_batch)]
            step += 1
