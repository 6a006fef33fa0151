"""What a lookup found, of one chunk of the training set or of all, and the files that keep it.

Shape suffix: Q images of the evaluation set that can be decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dalle_dist import storage
from dalle_dist.data.array_store import ArrayStore, read_arrays, write_arrays
from dalle_dist.errors import UserError

UNFINISHED, FOUND = "unfinished", "nearest.npz"


@dataclass(frozen=True)
class Nearest:
    """The nearest training image of each, numbers_Q and similarities_Q (-inf: there is none).

    corrupt   training images that cannot be decoded
    """

    numbers_Q: NDArray[np.int64]
    similarities_Q: NDArray[np.float32]
    corrupt: int

    def merged(self, later: Nearest) -> Nearest:
        """With a chunk of higher numbers; of equally similar images the first stays."""
        better_Q = later.similarities_Q > self.similarities_Q
        return Nearest(
            np.where(better_Q, later.numbers_Q, self.numbers_Q),
            np.where(better_Q, later.similarities_Q, self.similarities_Q),
            self.corrupt + later.corrupt,
        )


@dataclass(frozen=True)
class Found:
    """`nearest` of the evaluated images of numbers evaluated_Q; the others cannot be decoded."""

    evaluated_Q: NDArray[np.int64]
    nearest: Nearest


class ChunkStore(ArrayStore):
    """Finished chunks in a folder inside OUT, local or remote."""

    def __init__(self, out: str) -> None:
        super().__init__(storage.join(out, UNFINISHED))

    def write(self, digest: str, nearest: Nearest) -> None:
        self.write_part(digest, **vars(nearest))

    def read(self, digest: str) -> Nearest:
        return _nearest(self.read_part(digest))


def write_found(out: str, digest: str, found: Found) -> None:
    """What `read_found` reads."""
    arrays = vars(found.nearest) | {"evaluated_Q": found.evaluated_Q, "digest": digest}
    write_arrays(storage.join(out, FOUND), **arrays)


def read_found(out: str, digest: str) -> Found | None:
    """What an earlier call found; None if there was none.

    Raises UserError: it was about other sets, or by another CLIP, or is damaged.
    """
    path = storage.join(out, FOUND)
    if not storage.exists(path):
        return None
    arrays = read_arrays(path)
    if str(arrays["digest"]) != digest:
        raise UserError(f"{path}: is of other sets or another CLIP; choose another --out")
    return Found(arrays["evaluated_Q"], _nearest(arrays))


def _nearest(arrays: dict[str, NDArray]) -> Nearest:
    return Nearest(arrays["numbers_Q"], arrays["similarities_Q"], int(arrays["corrupt"]))
