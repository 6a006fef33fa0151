"""Finished batches of candidates, so that a call that was cut off goes on where it was.

Codes, not images: they are small, and the image tokenizer is quick beside the transformer.

Shape suffixes: B candidates of a batch, N image tokens.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dalle_dist.data import storage

FOLDER = "unfinished"


@dataclass(frozen=True)
class Batch:
    """codes_BN, int64, on the CPU; scores_B, float64, if candidates are scored."""

    codes_BN: Tensor
    scores_B: Tensor | None


class CandidateStore:
    """Batches in a folder inside the call's own, local or remote, each a file by its digest."""

    def __init__(self, out: str, folder: str = FOLDER) -> None:
        self._folder = storage.join(out, folder)
        names = storage.list_files(self._folder)
        self._found = {name.partition(".")[0] for name in names}

    def __contains__(self, digest: str) -> bool:
        """Whether the batch was there when this call began."""
        return digest in self._found

    def write(self, digest: str, batch: Batch) -> None:
        arrays = {"codes": batch.codes_BN.numpy().astype(np.uint16)}
        if batch.scores_B is not None:
            arrays["scores"] = batch.scores_B.numpy()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        storage.write_bytes(self._path(digest), buffer.getvalue())

    def read(self, digest: str) -> Batch:
        with np.load(
            io.BytesIO(storage.read_bytes(self._path(digest))), allow_pickle=False
        ) as all_:
            scores = torch.from_numpy(all_["scores"]) if "scores" in all_ else None
            return Batch(torch.from_numpy(all_["codes"].astype(np.int64)), scores)

    def remove(self, digests: Iterable[str]) -> None:
        """What is no longer needed; batches of other calls that were cut off stay."""
        for digest in digests:
            storage.remove(self._path(digest))
        storage.remove_empty(self._folder)

    def _path(self, digest: str) -> str:
        return storage.join(self._folder, f"{digest}.npz")
