"""Tars in WebDataset's layout, img2dataset's among them: one shard of each part from each tar."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle_dist import storage
from dalle_dist.data.build.captions import decoded, in_json
from dalle_dist.data.build.folder import CAPTIONS, HIDDEN, ORPHAN
from dalle_dist.data.build.keys import Split, UniqueKeys, key_of, printable, share
from dalle_dist.data.build.plan import PARTS
from dalle_dist.data.build.samples import Recipe, samples
from dalle_dist.data.decode import NOT_A_PICTURE, picture_extensions
from dalle_dist.data.shard_job import Note, Sample

ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error)


@dataclass(frozen=True)
class TarSample:
    """A candidate (`samples.Candidate`): the members of one key."""

    key: str
    name: str
    members: dict[str, bytes]

    @property
    def lot(self) -> str:
        return self.key

    @property
    def identity(self) -> str:
        return self.key

    def caption(self, encoding: str | None) -> str:
        found = next((end for end in CAPTIONS if end in self.members), None)
        if found is None:
            return ""
        return (in_json if found == "json" else decoded)(self.members[found], encoding)

    def image(self) -> bytes:
        return next(self.members[e] for e in self.members if e in picture_extensions())


@dataclass(frozen=True)
class Tars:
    """Tars of a folder, by their names in it; `prefixed`: whether keys need the tar's name."""

    folder: str
    names: Sequence[str]

    @property
    def prefixed(self) -> bool:
        """img2dataset's keys begin with the number of their tar; others' count anew in each."""
        lengths = {len(name) for name in self.names}
        return len(lengths) > 1 or any("/" in name for name in self.names)

    def key(self, tar: str, stem: str) -> str:
        """Of the sample with this stem in this tar."""
        first = key_of(tar.partition(".tar")[0].removesuffix(".tgz"))
        plain = key_of(stem)
        return plain if plain.startswith(first) and not self.prefixed else f"{first}__{plain}"

    def split(self, seed: int, held_out: float) -> Split:
        """Of the first tar that has two samples: one is held out, and one is trained on."""
        for tar in self.names:
            keys = sorted(self._whole_keys(tar), key=lambda key: share(key, seed))
            if len(keys) > 1:
                lowest, highest = keys[0], keys[-1]
                held = lowest if share(lowest, seed) > held_out else None
                trained = highest if share(highest, seed) <= held_out else None
                return Split(seed, held_out, held, trained)
        return Split(seed, held_out)

    def _whole_keys(self, tar: str) -> Iterator[str]:
        """Of samples with a picture and a caption."""
        reader = TarReader(storage.join(self.folder, tar), lambda stem: False)
        for stem, members in reader:
            if is_whole(members):
                yield self.key(tar, stem)


@dataclass(frozen=True)
class TarUnit:
    """A unit of a job (`shard_job.Unit`): what one tar has for one part."""

    part: str
    name: str
    tars: Tars
    tar: str
    split: Split
    recipe: Recipe

    def samples(self, note: Note) -> Iterator[Sample]:
        keys, apart = UniqueKeys(), list[tuple[str, str]]()
        path = storage.join(self.tars.folder, self.tar)
        reader = TarReader(path, lambda stem: self.split.part(self._lot(stem)) == self.part)
        yield from samples(self._candidates(reader, keys, apart), self.recipe, note)
        note["skipped"] += apart
        if self.part == PARTS[0]:
            note["skipped"] += [[f"{self.tar}/{n}", reason] for n, reason in reader.skipped]
            note["skipped"] += [[self.tar, reader.damage]] if reader.damage else []

    def _lot(self, stem: str) -> str:
        return self.tars.key(self.tar, stem)

    def _candidates(
        self, reader: TarReader, keys: UniqueKeys, apart: list[tuple[str, str]]
    ) -> Iterator[TarSample]:
        for stem, members in reader:
            lot, name = self._lot(stem), f"{self.tar}/{printable(stem)}"
            key = keys.unique(lot, stem)
            if self.split.part(lot) != self.part:
                continue
            if not picture_extensions().isdisjoint(members):
                yield TarSample(key, name, members)
            else:
                told = not set(CAPTIONS).isdisjoint(members)
                apart.append((name, ORPHAN if told else NOT_A_PICTURE))


class TarReader:
    """The samples of a tar: consecutive members of one stem.

    Attributes:
        skipped: members that are of no sample, and why.
        damage: why the tar ends before its end, or "".
    """

    def __init__(self, path: str, wanted: Callable[[str], bool]) -> None:
        """`wanted`: of which stems the contents are read; those of others are empty."""
        self._path, self._wanted = path, wanted
        self.skipped, self.damage = list[tuple[str, str]](), ""

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        stem, members = "", dict[str, bytes]()
        try:
            for name, content in self._members(storage.fetch(self._path)):
                folder, slash, last = name.rpartition("/")
                first, _, end = last.partition(".")
                if members and folder + slash + first != stem:
                    yield stem, members
                    members = {}
                stem = folder + slash + first
                members.setdefault(end.lower(), content)
        except ERRORS as error:
            self.damage = f"damaged: {' '.join(str(error).split())}"
        # Of the sample at which a damaged tar ends, something may be missing.
        if members and not (self.damage and not is_whole(members)):
            yield stem, members

    def _members(self, path: Path) -> Iterator[tuple[str, bytes]]:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isfile() and not name.rpartition("/")[2].startswith("."):
                    yield name, self._content(tar, member, name)
                elif not member.isdir():
                    reason = HIDDEN if member.isfile() else "not a file"
                    self.skipped.append((printable(name), reason))
            check_end(tar)

    def _content(self, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> bytes:
        folder, slash, last = name.rpartition("/")
        if not self._wanted(folder + slash + last.partition(".")[0]):
            return b""
        file = tar.extractfile(member)
        assert file is not None
        return file.read()


def is_whole(members: dict[str, bytes]) -> bool:
    """Whether there are a picture and a caption among them."""
    told = not set(CAPTIONS).isdisjoint(members)
    return told and not picture_extensions().isdisjoint(members)


def check_end(tar: tarfile.TarFile) -> None:
    """Raises TarError: `tarfile` takes a head that is damaged or cut off for the end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
        raise tarfile.ReadError("ends too early")
