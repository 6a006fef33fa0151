"""What a report looks at: the held-out images with their codes, and the training images.

Shape suffixes: B images, M images of a chunk, C channels, H and W pixels, T text positions, N image
tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_dist import storage
from dalle_dist.checkpoint.release import Release
from dalle_dist.config import Config
from dalle_dist.data.image_dataset import ImageDataset, ImageSample
from dalle_dist.data.token_dataset import TokenDataset, collate_tokens
from dalle_dist.errors import DataError
from dalle_dist.image_tokenizer.protocol import ImageTokenizer

TRAINING_IMAGES = 20_000  # that samples are compared with, at most
CHUNK = 64  # images


@dataclass(frozen=True)
class HeldOut:
    """The held-out images, in the order of their token shards."""

    captions: list[str]
    images_BCHW: Tensor  # uint8
    text_BT: Tensor
    codes_BN: Tensor

    @classmethod
    def load(cls, config: Config, tokens: TokenDataset, size: int) -> HeldOut:
        """Raises DataError: image shards missing, or other images than the tokens are of."""
        images = _images(config, "held-out", size)
        # A corrupt image has no tokens, so the two are matched by key.
        by_key = {sample.key: sample for sample in map(images.read, range(len(images))) if sample}
        keys = [tokens.key(i) for i in range(len(tokens))]
        missing = next((key for key in keys if key not in by_key), None)
        if missing is not None:
            raise DataError(
                f"{images.shards.folder}: no image {missing}, which {tokens.shards.folder} has "
                "tokens of; encode the images again"
            )
        samples = [by_key[key] for key in keys]
        text_BT, codes_BN, _ = collate_tokens([tokens[i] for i in range(len(tokens))])
        return cls(
            [sample.caption for sample in samples],
            torch.stack([sample.image_CHW for sample in samples]),
            text_BT,
            codes_BN,
        )

    def reconstructed(self, tokenizer: ImageTokenizer) -> Tensor:
        """What the image tokenizer makes of its own codes, on the CPU: images_BCHW in [0, 1]."""
        return torch.cat([tokenizer.decode(part).cpu() for part in self.codes_BN.split(64)])


class TrainingImages:
    """The first TRAINING_IMAGES images that were trained on, without augmentation.

    total  images of the training set, corrupt ones included
    words  of the captions of the last iteration's images
    """

    def __init__(self, config: Config, size: int) -> None:
        self._images = _images(config, "train", size)
        self.total = len(self._images)
        self._compared = range(min(TRAINING_IMAGES, self.total))
        self._read: list[int] = []  # those of the last iteration that could be decoded
        self.words: set[str] = set()

    def __len__(self) -> int:
        """Images that are compared with."""
        return len(self._compared)

    def __iter__(self) -> Iterator[Tensor]:
        """images_MCHW, uint8, chunk by chunk; corrupt images are left out."""
        self._read, self.words = [], set()
        for start in range(0, len(self), CHUNK):
            chunk = self._compared[start : start + CHUNK]
            found = [(i, sample) for i in chunk if (sample := self._images.read(i))]
            self._read += [i for i, _ in found]
            self.words.update(*(words_of(sample.caption) for _, sample in found))
            if found:
                yield torch.stack([sample.image_CHW for _, sample in found])

    def sample(self, number: int) -> ImageSample:
        """Image `number` of those that the last iteration gave."""
        return self._images[self._read[number]]


def words_of(caption: str) -> set[str]:
    """In lower case, without punctuation."""
    return set(re.findall(r"\w+", caption.lower()))


def read_tokens(config: Config, part: str, release: Release) -> TokenDataset:
    """Raises DataError: token shards missing, or of another image tokenizer."""
    return TokenDataset(
        storage.join(config.paths.tokens, part),
        None,
        release.tokenizer,
        config.transformer.text_tokens,
        release.image_tokenizer.fingerprint,
        config.transformer.image_grid,
    )


def _images(config: Config, part: str, size: int) -> ImageDataset:
    return ImageDataset(storage.join(config.paths.images, part), None, size, None, config.seed)
