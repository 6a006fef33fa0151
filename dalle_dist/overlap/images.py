"""A set of images in shards, read in blocks that stand at fixed places."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import NamedTuple, TypeVar

from PIL import Image

from dalle_dist.data.decode import decode_sample
from dalle_dist.data.shards import ShardSet
from dalle_dist.errors import DataError

# Images whose features are computed at once. What one gets is rounded otherwise in another batch,
# so that blocks hang neither on chunks nor on ranks.
BLOCK = 64
S = TypeVar("S", range, list[int])


class Label(NamedTuple):
    key: str
    caption: str


class ImageSet:
    """The images of a folder of image shards, local or remote, by their number in it.

    digest   hex digits of a hash of what the shards hold

    Raises DataError: no such shards, or another kind of them.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self._shards = folder, ShardSet(folder, "images")
        listed = json.dumps([asdict(shard) for shard in self._shards.index.shards])
        self.digest = hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._shards)

    def images(self, numbers: range) -> tuple[list[int], list[Image.Image]]:
        """Those that can be decoded, and their numbers."""
        decoded = [(number, self.image(number)) for number in numbers]
        whole = [(number, image) for number, image in decoded if image is not None]
        return [number for number, _ in whole], [image for _, image in whole]

    def image(self, number: int) -> Image.Image | None:
        return decode_sample(self._shards.read(number))

    def label(self, number: int) -> Label:
        files = self._shards.read(number)
        caption = files.get("txt", b"").decode(errors="replace")
        return Label(files["__key__"].decode(), caption)

    def none_readable(self) -> DataError:
        return DataError(f"{self.folder}: none of {len(self)} images can be decoded")


def parts(numbers: S, size: int) -> list[S]:
    """`numbers`, a range or a list, in runs of `size`; the last may be shorter."""
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
