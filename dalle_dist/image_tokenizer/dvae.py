"""The dVAE of stage 1 as an image tokenizer (paper 2.1): `dvae.safetensors`.

Shape suffixes as in `protocol.py`; G codes per side.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar

import torch
from torch import Tensor

from dalle_dist import storage
from dalle_dist.checkpoint.formats import (
    SUFFIX,
    State,
    Tensors,
    fill,
    fingerprint,
    load_tensors,
    read_notes,
    save_tensors,
)
from dalle_dist.config import DVAEConfig
from dalle_dist.dvae.model import DVAE
from dalle_dist.errors import CheckpointError

FILE, SHAPE = f"dvae{SUFFIX}", "dvae"


class DVAETokenizer:
    """Likeliest codes of a frozen dVAE in fp32.

    model   the dVAE
    config  its shape
    """

    files: ClassVar[tuple[str, ...]] = (FILE,)

    def __init__(self, model: DVAE, fingerprint: str = "") -> None:
        self.model, self.config = model.eval().requires_grad_(False), model.config
        self._fingerprint = fingerprint

    @classmethod
    def load(cls, folder: str, device: torch.device | str = "cpu") -> DVAETokenizer:
        """See `ImageTokenizer`; the file says the dVAE's shape itself."""
        path = storage.join(folder, FILE)
        if not storage.exists(path):
            raise CheckpointError(f"{folder}: no release folder ({FILE} is missing){_hint(folder)}")
        state, notes = load_tensors(path), read_notes(path)
        if SHAPE not in notes:
            raise CheckpointError(f"{path}: does not say the shape of its dVAE")
        found = cls.of(json.loads(notes[SHAPE]), state, path)
        found.model.to(device)
        return found

    @classmethod
    def of(cls, shape: dict[str, Any], state: State, path: str = "the state") -> DVAETokenizer:
        """Of weights in memory; `shape` are the fields of DVAEConfig.

        Raises CheckpointError, naming `path`: they do not fit.
        """
        with torch.device("meta"):
            model = DVAE(DVAEConfig(**shape))
        return cls(fill(model, state, path), fingerprint(state))

    @classmethod
    def save(cls, folder: str, shape: dict[str, Any], state: State) -> str:
        """Write the file of a release folder; returns the weights' fingerprint."""
        return save_dvae(folder, DVAEConfig(**shape), state)

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of its DVAEConfig, as `of` and `save` take them."""
        return dataclasses.asdict(self.config)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def grid(self) -> int:
        return self.config.grid

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        return self.model.codes(images_BCHW.to(self._device())).flatten(1)

    @torch.no_grad()
    def decode(self, codes_BN: Tensor) -> Tensor:
        codes_BGG = codes_BN.to(self._device()).unflatten(1, (self.grid, self.grid))
        return self.model.decode(codes_BGG)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def save_dvae(folder: str, config: DVAEConfig, state: Tensors) -> str:
    """Write the file of a release folder; returns the weights' fingerprint."""
    notes = {SHAPE: json.dumps(dataclasses.asdict(config))}
    return save_tensors(storage.join(folder, FILE), state, notes)


def _hint(folder: str) -> str:
    """The fix, where the folder of a run was named in place of its release."""
    inner = storage.join(folder, "release")
    if storage.exists(storage.join(inner, FILE)):
        return f"; did you mean {inner}?"
    if storage.exists(storage.join(folder, "checkpoints")):
        return "; this run has none yet: go on with --resume auto"
    return ""
