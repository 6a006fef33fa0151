"""What a tar that was made elsewhere holds: the rows of a side file, and what is left out and why.

Members belong to one sample while their names are the same up to the first dot of the base name, as
webdataset has it. Nothing is read but captions and the heads of images.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from dalle_dist.data.build.keys import printable
from dalle_dist.data.build.tars import ERRORS, check_end
from dalle_dist.data.decode import EXTENSIONS, picture_extensions, size_of
from dalle_dist.data.shards.side_file import (
    ABOUT_EXTENSION,
    CAPTION_EXTENSION,
    Extents,
    SideRows,
)

CODES = "npy"
NO_IMAGE = "no image (.jpg, .png, .webp)"
OTHER_FORMAT = "an image of another format, which 'data build' converts"
NO_CAPTION = "kept, but without a caption (.txt)"


@dataclass
class TarScan:
    """Of one tar; `kind` is "images" or "tokens".

    Attributes:
        rows: of the samples that can be used.
        counts: members and samples that cannot, and what else is to be said, by its reason.
        examples: a name of each.
        damage: why the tar ends before its end, or "".
        first: the first key.
    """

    kind: str
    rows: SideRows = field(default_factory=SideRows)
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    damage: str = ""
    first: str = ""
    _keys: set[str] = field(default_factory=set)

    def read(self, path: Path) -> None:
        """Raises OSError: not to be opened."""
        with path.open("rb") as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    self._read(tar)
            except ERRORS as error:
                self.damage = " ".join(str(error).split())

    def _read(self, tar: tarfile.TarFile) -> None:
        key, members = "", dict[str, tarfile.TarInfo]()
        for member in tar:
            if member.isdir() or (split := self._split(member)) is None:
                continue
            if members and split[0] != key:
                self._take(tar, key, members)
                members = {}
            key = split[0]
            if split[1] in members:
                self._count("a second file of the same extension", member.name)
            members.setdefault(split[1], member)
        # Of the sample at which a damaged tar ends, something may be missing.
        check_end(tar)
        if members:
            self._take(tar, key, members)

    def _split(self, member: tarfile.TarInfo) -> tuple[str, str] | None:
        """Key and extension; None for what is of no sample."""
        name = member.name.removeprefix("./")
        folder, slash, last = name.rpartition("/")
        first, _, extension = last.partition(".")
        wrong = ""
        if not member.isreg() or member.issparse():
            wrong = "not a plain file"
        elif not first or not extension:
            wrong = "hidden, or without an extension"
        elif printable(name) != name:
            wrong = "a name that is not UTF-8"
        if wrong:
            self._count(wrong, name)
            return None
        return f"{folder}{slash}{first}", extension.lower()

    def _take(self, tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]) -> None:
        if key in self._keys:
            self._count("a key that the tar has already", key)
            return
        about = _about_codes(members) if self.kind == "tokens" else _about(tar, members)
        if isinstance(about, str):
            self._count(about, key)
            return
        self._keys.add(key)
        self.first = self.first or key
        if CAPTION_EXTENSION not in members:
            self._count(NO_CAPTION, key)
        extents: Extents = {end: (m.offset_data, m.size) for end, m in members.items()}
        files = {ABOUT_EXTENSION: json.dumps(about).encode()}
        if CAPTION_EXTENSION in members:
            files[CAPTION_EXTENSION] = _content(tar, members[CAPTION_EXTENSION])
        self.rows.add(key, files, extents)

    def _count(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, printable(name))


def _about(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> dict[str, int] | str:
    """The image's size, or why the sample is left out."""
    found = next((end for end in EXTENSIONS if end in members), None)
    if found is None:
        other = not picture_extensions().isdisjoint(members)
        return OTHER_FORMAT if other else NO_IMAGE
    file = tar.extractfile(members[found])
    assert file is not None
    size = size_of(file)
    return "damaged image" if size is None else {"width": size[0], "height": size[1]}


def _about_codes(members: dict[str, tarfile.TarInfo]) -> dict[str, int] | str:
    return {} if CODES in members else "no codes (.npy)"


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()
