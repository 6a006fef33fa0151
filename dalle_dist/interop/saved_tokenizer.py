"""Image tokenizers of other programs in a release: weights, and their shape in the file's notes.

Shape suffixes: B batch, N codes in raster order, G codes per side.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from dalle_dist import storage
from dalle_dist.checkpoint.formats import (
    SUFFIX,
    State,
    fill,
    fingerprint,
    load_tensors,
    read_notes,
    save_tensors,
)
from dalle_dist.errors import CheckpointError

FILE, SHAPE = f"image_tokenizer{SUFFIX}", "shape"


class SavedTokenizer(ABC):
    """An `ImageTokenizer`; a subclass gives its network and what encodes and decodes.

    shape  what `build` makes the network from, plain JSON; `image_size`, `grid` and
           `codebook_size` are in it
    """

    files: ClassVar[tuple[str, ...]] = (FILE,)
    kind: ClassVar[str]  # in the registry, and in the file's notes

    def __init__(self, model: nn.Module, shape: dict[str, Any], fingerprint: str = "") -> None:
        self.model, self.shape = model.eval().requires_grad_(False), shape
        self._fingerprint = fingerprint

    @staticmethod
    @abstractmethod
    def build(shape: dict[str, Any]) -> nn.Module:
        """The network, weights as they come."""

    @abstractmethod
    def codes(self, images_BCHW: Tensor) -> Tensor:
        """codes_BGG of images in [0, 1] on the network's device."""

    @abstractmethod
    def images(self, codes_BGG: Tensor) -> Tensor:
        """images_BCHW in [0, 1] of codes on the network's device."""

    @classmethod
    def load(cls, folder: str, device: torch.device | str = "cpu") -> Self:
        """See `ImageTokenizer`."""
        path = storage.join(folder, FILE)
        if not storage.exists(path):
            raise CheckpointError(f"{folder}: no release folder ({FILE} is missing)")
        state, notes = load_tensors(path), read_notes(path)
        if SHAPE not in notes or notes.get("kind") != cls.kind:
            found = notes.get("kind", "nothing that says its kind")
            raise CheckpointError(f"{path}: not an image tokenizer {cls.kind}, but {found}")
        shape = json.loads(notes[SHAPE])
        return cls.of(shape, state, path).to(device)

    @classmethod
    def of(cls, shape: dict[str, Any], state: State, path: str = "the state") -> Self:
        """Of weights in memory. Raises CheckpointError, naming `path`: they do not fit."""
        with torch.device("meta"):
            model = cls.build(shape)
        return cls(fill(model, state, path), shape, fingerprint(state))

    @classmethod
    def save(cls, folder: str, shape: dict[str, Any], state: State) -> str:
        """Write the file of a release folder; returns the weights' fingerprint."""
        notes = {SHAPE: json.dumps(shape), "kind": cls.kind}
        save_tensors(storage.join(folder, FILE), state, notes)
        return fingerprint(state)

    def to(self, device: torch.device | str) -> Self:
        self.model.to(device)
        return self

    @property
    def image_size(self) -> int:
        return int(self.shape["image_size"])

    @property
    def grid(self) -> int:
        return int(self.shape["grid"])

    @property
    def codebook_size(self) -> int:
        return int(self.shape["codebook_size"])

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        return self.codes(images_BCHW.to(self._device())).flatten(1)

    @torch.no_grad()
    def decode(self, codes_BN: Tensor) -> Tensor:
        codes_BGG = codes_BN.to(self._device()).unflatten(1, (self.grid, self.grid))
        return self.images(codes_BGG)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device
