"""What lies in a folder of people's files: pictures, their captions, and all else by its reason."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from dalle_dist.data.build.captions import of_name
from dalle_dist.data.build.keys import UniqueKeys, key_of, printable
from dalle_dist.data.build.samples import PictureFile
from dalle_dist.data.decode import NOT_A_PICTURE, formats, picture_extensions

CAPTIONS = ("txt", "caption", "json")  # the first that lies beside a picture is its caption
TARS = ("tar", "tgz", "tar.gz")
TABLES = ("parquet", "csv", "tsv", "jsonl")
DROPPINGS = frozenset(("thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"))
OURS = ("train", "held-out", "unfinished")
HIDDEN = "hidden, or a system's own file"
ORPHAN = "caption without an image"
SECOND = "another caption of an image that has one"
A_TABLE = "a table: name it as the source, or by --captions-from"
Skipped = list[tuple[str, str]]  # name, reason


@dataclass
class Found:
    """Paths relative to the root, in the order in which they are walked through.

    Attributes:
        captions: path of a picture to that of its caption.
        skipped: what is not used, but tars and tables; those count when they are not asked for.
        linked: folders that are links.
    """

    root: str
    pictures: list[str] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)
    tars: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    skipped: Skipped = field(default_factory=list)
    linked: list[str] = field(default_factory=list)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"  # thirty times as quick as a Path

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append((printable(name), reason))


def extension(name: str) -> str:
    return name.lower().rpartition(".")[2] if "." in name else ""


def without_extension(name: str) -> str:
    """A path; as `os.path.splitext` has it, but for a name that begins with its only dot."""
    stem, _, end = name.rpartition(".")
    return name if not stem or "/" in end else stem


def walk(root: Path, out: Path | None) -> Found:
    """All files below `root`. A folder that several paths lead to is taken once, links last.

    Args:
        out: a folder that is passed over where it lies in `root`: the output.
    """
    walker = _Walker(Found(str(root)), out)
    walker.take("", hidden=False)
    while walker.links:
        name = walker.links.pop(0)
        if walker.take(name, hidden=False):
            walker.found.linked.append(printable(name))
    return walker.found


class _Walker:
    def __init__(self, found: Found, out: Path | None) -> None:
        self.found, self.links = found, list[str]()
        self._ours = _made_by_us(found.root, out)
        self._seen = set[tuple[int, int]]()

    def take(self, name: str, hidden: bool) -> bool:
        """A folder and those in it; False where it is not taken."""
        path = self.found.path(name)
        if os.path.realpath(path) in self._ours:
            return False
        try:
            stat = os.stat(path)  # noqa: PTH116
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            self.found.skip(name or ".", f"cannot be read: {error.strerror}")
            return False
        if (stat.st_dev, stat.st_ino) in self._seen:
            self.found.skip(name, "a link to a folder that is taken already")
            return False
        self._seen.add((stat.st_dev, stat.st_ino))
        self._take_entries(name, entries, hidden)
        return True

    def _take_entries(self, folder: str, entries: list[os.DirEntry[str]], hidden: bool) -> None:
        captions: dict[str, dict[str, str]] = defaultdict(dict)
        pictures, others = list[str](), list[str]()
        before = f"{folder}/" if folder else ""
        for entry in entries:
            name = before + entry.name
            odd = hidden or entry.name.startswith(".") or entry.name.lower() in DROPPINGS
            if _is_folder(entry):
                if entry.is_symlink():
                    self.links.append(name)
                else:
                    self.take(name, odd)
            elif odd:
                self.found.skip(name, HIDDEN)
            elif not _is_file(entry):
                broken = entry.is_symlink()
                self.found.skip(name, "a broken link" if broken else "not a file")
            else:
                self._take_file(name, pictures, captions, others)
        self._match(pictures, captions, others)

    def _take_file(
        self, name: str, pictures: list[str], captions: dict[str, dict[str, str]], others: list[str]
    ) -> None:
        end = extension(name)
        if end in picture_extensions():
            pictures.append(name)
        elif end in CAPTIONS:
            captions[name[: -len(end) - 1]].setdefault(end, name)
        elif name.lower().endswith(TARS):
            self.found.tars.append(name)
        elif end in TABLES:
            self.found.tables.append(name)
        else:
            others.append(name)

    def _match(
        self, pictures: list[str], captions: dict[str, dict[str, str]], others: list[str]
    ) -> None:
        for name in others:
            # What a browser saved as "photo" or "photo.jpg_large" is known by its content.
            if without_extension(name) in captions and _holds_picture(self.found.path(name)):
                pictures.append(name)
            else:
                self.found.skip(name, NOT_A_PICTURE)
        taken = set[str]()
        for name in pictures:
            beside = captions.get(without_extension(name)) or captions.get(name)
            if beside:
                self.found.captions[name] = next(beside[e] for e in CAPTIONS if e in beside)
                taken.add(self.found.captions[name])
        self.found.pictures += pictures
        for beside in captions.values():
            unused = [name for name in beside.values() if name not in taken]
            for name in unused:
                self.found.skip(name, SECOND if len(unused) < len(beside) else ORPHAN)


def _made_by_us(root: str, out: Path | None) -> set[str]:
    """Folders that are passed over: the output, or its parts where it is the source itself."""
    if out is None:
        return set()
    folder = os.path.realpath(out)
    if folder != os.path.realpath(root):
        return {folder}
    return {os.path.join(folder, name) for name in OURS}  # noqa: PTH118


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _holds_picture(path: str) -> bool:
    try:
        with Image.open(path, formats=formats()):
            return True
    except Exception:  # as in `decode.read_picture`
        return False


def candidates(found: Found, source: str, captions_from: str) -> list[PictureFile]:
    """The pictures of a folder. What is not asked for among the other files is counted.

    Args:
        source: the folder's name, a caption for the pictures in none of its folders.
        captions_from: "beside", "folder" or "file"; from a table, they come later.
    """
    keys, made = UniqueKeys(), list[PictureFile]()
    if captions_from != "beside":
        for name in sorted({*found.captions.values()}):
            found.skip(name, "a caption file, not asked for")
        found.captions.clear()
    for name in sorted(found.pictures):
        stem = without_extension(name)
        lot = key_of(stem)
        key = keys.unique(lot, name)
        text, beside = "", None
        if captions_from == "file":
            text = of_name(printable(Path(stem).name))
        elif captions_from == "folder":
            text = of_name(printable(Path(name).parent.name or Path(source.rstrip("/")).name))
        elif name in found.captions:
            beside = found.path(found.captions[name])
        made.append(PictureFile(key, lot, printable(name), found.path(name), text, beside))
    for names, reason in ((found.tars, "a tar: build it by itself"), (found.tables, A_TABLE)):
        for name in names:
            found.skip(name, reason)
    return made
