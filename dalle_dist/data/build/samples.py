"""A picture and its caption to a sample of a shard, or the reason why it is not used."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

from dalle_dist import storage
from dalle_dist.data.build.captions import (
    NO_CAPTION,
    CaptionError,
    chosen,
    decoded,
    in_json,
    whole,
)
from dalle_dist.data.build.filters import Filters
from dalle_dist.data.decode import Picture, read_picture
from dalle_dist.data.shard_job import Note, Sample
from dalle_dist.errors import DataError, UserError


@dataclass(frozen=True)
class Recipe:
    """What is made of a picture and its caption.

    Attributes:
        size: pixels of the shorter side that larger pictures are shrunk to; None: as they are.
        caption: one of `captions.CHOICES`.
        encoding: of captions without a byte order mark; None: UTF-8.
    """

    size: int | None = None
    caption: str = "first-line"
    encoding: str | None = None
    filters: Filters = field(default_factory=Filters)


class Candidate(Protocol):
    """What may become a sample. Its methods raise OSError, DataError or CaptionError."""

    @property
    def key(self) -> str: ...

    @property
    def lot(self) -> str:
        """Candidates of one lot are held out together, or not: they may show the same."""
        ...

    @property
    def name(self) -> str:
        """What a report calls it."""
        ...

    @property
    def identity(self) -> str:
        """Differs from that of any other candidate, and is the same on any machine."""
        ...

    def caption(self, encoding: str | None) -> str:
        """All lines of it."""
        ...

    def image(self) -> bytes: ...


@dataclass(frozen=True)
class PictureFile:
    """A picture by its path, local or remote, with its caption or the path of that."""

    key: str
    lot: str
    name: str
    path: str
    text: str = ""
    text_path: str | None = None

    @property
    def identity(self) -> str:
        # Not the paths: what was fetched lies elsewhere each time.
        kind = (self.text_path or "").rpartition(".")[2]
        return "\0".join((self.key, self.name, self.text, kind))

    def caption(self, encoding: str | None) -> str:
        if self.text_path is None:
            return whole(self.text)
        data = _content(self.text_path)
        read = in_json if self.text_path.lower().endswith(".json") else decoded
        return read(data, encoding)

    def image(self) -> bytes:
        if not storage.is_remote(self.path):
            return self._local()
        try:
            return storage.read_bytes(self.path)
        except DataError:
            # That there is no such object costs this picture, a store that is down ends the job.
            if storage.exists(self.path):
                raise
            raise FileNotFoundError(0, "no such object") from None

    def _local(self) -> bytes:
        try:
            return _content(self.path)
        except ValueError:  # NUL, or half a character
            raise FileNotFoundError(0, "not the name of a file") from None


def _content(path: str) -> bytes:
    # Small files are mostly the time that it takes to open them: no Path, no buffer.
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        return file.readall()


@dataclass(frozen=True)
class FilesUnit:
    """A unit of a job (`shard_job.Unit`) of candidates that are read one by one."""

    part: str
    name: str
    candidates: tuple[Candidate, ...]
    recipe: Recipe

    def samples(self, note: Note) -> Iterator[Sample]:
        return samples(self.candidates, self.recipe, note)


def samples(candidates: Iterable[Candidate], recipe: Recipe, note: Note) -> Iterator[Sample]:
    """The samples that can be made.

    `note` has, at the end, `used`, their count; `formats`, counts of their files' formats; and
    `skipped`, name and reason of each of the others.
    """
    used = Counter[str]()
    note.update(used=0, formats={}, skipped=[])
    for candidate in candidates:
        made = try_sample(candidate, recipe)
        if isinstance(made, str):
            note["skipped"].append([candidate.name, made])
            continue
        files, format_ = made
        used[format_] += 1
        yield candidate.key, files
    note.update(used=used.total(), formats=dict(sorted(used.items())))


def try_sample(candidate: Candidate, recipe: Recipe) -> tuple[dict[str, bytes], str] | str:
    """The sample's files and the format of the picture's, or why there are none.

    Raises:
        DataError: what is no fault of the candidate, by its name.
    """
    try:
        return _sample(candidate, recipe)
    except CaptionError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except UserError:
        raise
    except Exception as error:
        raise DataError(f"{candidate.name}: {type(error).__name__}: {error}") from error


def _sample(candidate: Candidate, recipe: Recipe) -> tuple[dict[str, bytes], str] | str:
    caption = chosen(candidate.caption(recipe.encoding), recipe.caption)
    if not caption:
        return NO_CAPTION
    caption, reason = recipe.filters.lines(caption)
    if not caption:
        return reason or NO_CAPTION
    data = candidate.image()
    picture = read_picture(data)
    if isinstance(picture, str):
        return picture
    reason = recipe.filters.against_size(*picture.image.size)
    if reason is not None:
        return reason
    extension, data, image = _stored(picture, data, recipe.size)
    about = {"source": candidate.name, "width": image.width, "height": image.height}
    files = {extension: data, "txt": caption.encode(), "json": json.dumps(about).encode()}
    return files, picture.format


def _stored(picture: Picture, data: bytes, size: int | None) -> tuple[str, bytes, Image.Image]:
    """Extension and bytes of the shard's member, and the image that they hold."""
    image = picture.image
    if size is not None and min(image.size) > size:
        image = _shrink(image, size)
    elif picture.usual is not None:
        return picture.usual, data, image
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "png", buffer.getvalue(), image


def _shrink(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    return image.resize(shape, Image.Resampling.BOX)
