"""What an image tokenizer must be able to do, whoever trained it.

A new kind is a file with such a class and one entry in `registry.py`.

Shape suffixes: B batch, C colour channels, H and W pixels, N image tokens in raster order.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor


class ImageTokenizer(Protocol):
    """Frozen; codes are below `codebook_size`, `grid` x `grid` of them for each image.

    files  names of the files in a release folder that `load` reads; a release of the transformer
           has copies of them
    """

    files: ClassVar[tuple[str, ...]]

    @classmethod
    def load(cls, folder: str, device: torch.device | str = "cpu") -> ImageTokenizer:
        """From a release folder, local or remote. Raises CheckpointError: no such release there."""

    @property
    def image_size(self) -> int:
        """Pixels per side of the images it was trained on."""

    @property
    def grid(self) -> int:
        """Codes per side of such an image."""

    @property
    def codebook_size(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """16 hex digits of everything the codes depend on."""

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Images, floats in [0, 1], to codes_BN, int64, on the tokenizer's device."""

    def decode(self, codes_BN: Tensor) -> Tensor:
        """Codes, int64, to images_BCHW, floats in [0, 1], on the tokenizer's device."""
