"""The set that a release is evaluated on: captions and images of a folder of image shards."""

from __future__ import annotations

import hashlib

from PIL import Image

from dalle_dist import storage
from dalle_dist.data.decode import decode_sample
from dalle_dist.data.shards import INDEX, ShardSet
from dalle_dist.errors import DataError


class Data:
    """Captions and images, by number.

    folder       the shards': `held-out` inside the one that was named, where there is one
    fingerprint  16 hex digits of the shards' own

    Raises DataError: no image shards there, or one missing.
    """

    def __init__(self, folder: str) -> None:
        inner = storage.join(folder, "held-out")
        self.folder = inner if storage.exists(storage.join(inner, INDEX)) else folder
        self._shards = ShardSet(self.folder, "images")
        self._shards.require_files()
        text = "".join(info.sha256 for info in self._shards.index.shards)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.captions = [self._caption(i) for i in range(len(self._shards))]

    def __len__(self) -> int:
        return len(self._shards)

    def image(self, i: int) -> Image.Image:
        """As the shard has it. Raises DataError: it cannot be decoded."""
        files = self._shards.read(i)
        image = decode_sample(files)
        if image is None:
            # Passed over, it would be another set than the one whose fingerprint is stated.
            raise DataError(
                f"{self.folder}: {files['__key__'].decode()} cannot be decoded; build the shards "
                "without it"
            )
        return image

    def chosen(self, count: int | None) -> list[int]:
        """Numbers of `count` captions, evenly spread; None: of all. Empty ones are passed over.

        Raises DataError: all are empty.
        """
        told = [i for i, caption in enumerate(self.captions) if caption]
        if not told:
            raise DataError(f"{self.folder}: all captions are empty, images cannot be sampled")
        return spread(told, count)

    def _caption(self, i: int) -> str:
        return self._shards.read(i).get("txt", b"").decode(errors="replace").strip()


def spread(numbers: list[int], count: int | None) -> list[int]:
    """At most `count` of the numbers, evenly spread and in their order."""
    count = min(count or len(numbers), len(numbers))
    return [numbers[k * len(numbers) // count] for k in range(count)]
