"""Finished batches of candidates, so that a call that was cut off goes on where it was.

Codes, not images: they are small, and the image tokenizer is quick beside the transformer.

Shape suffixes: B candidates of a batch, N image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dalle_dist import storage
from dalle_dist.data.array_store import ArrayStore

FOLDER = "unfinished"


@dataclass(frozen=True)
class Batch:
    """codes_BN, int64, on the CPU; scores_B, float64, if candidates are scored."""

    codes_BN: Tensor
    scores_B: Tensor | None


class CandidateStore(ArrayStore):
    """Batches in a folder inside the call's own, local or remote."""

    def __init__(self, out: str, folder: str = FOLDER) -> None:
        super().__init__(storage.join(out, folder))

    def write(self, digest: str, batch: Batch) -> None:
        arrays = {"codes": batch.codes_BN.numpy().astype(np.uint16)}
        if batch.scores_B is not None:
            arrays["scores"] = batch.scores_B.numpy()
        self.write_part(digest, **arrays)

    def read(self, digest: str) -> Batch:
        arrays = self.read_part(digest)
        scores_B = torch.from_numpy(arrays["scores"]) if "scores" in arrays else None
        return Batch(torch.from_numpy(arrays["codes"].astype(np.int64)), scores_B)
