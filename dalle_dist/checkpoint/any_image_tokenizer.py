"""The image tokenizer of a release folder, whatever its kind, for scripts and notebooks."""

from __future__ import annotations

import os

import torch

from dalle_dist.checkpoint.release import load_release_image_tokenizer
from dalle_dist.image_tokenizer import protocol


class ImageTokenizer(protocol.ImageTokenizer):
    """The protocol of all kinds, with a `load` that finds out which kind a folder has."""

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> protocol.ImageTokenizer:
        """From the release of a dVAE, of a transformer or of an import, local or remote.

        Raises CheckpointError: no such release there.
        """
        return load_release_image_tokenizer(os.fspath(folder), device)
