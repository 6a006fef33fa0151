"""Tables of pictures and captions: TSV, CSV, JSON lines, Parquet."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow
import pyarrow.parquet

from dalle_dist import storage
from dalle_dist.data.build.captions import MARKS
from dalle_dist.data.build.folder import Skipped, extension
from dalle_dist.data.build.keys import UniqueKeys, key_of, printable
from dalle_dist.data.build.samples import PictureFile
from dalle_dist.errors import DataError

# In lower case; the first that a table has is taken.
IMAGE_COLUMNS = (
    *("image", "image_path", "path", "file", "file_name", "filename", "filepath", "img", "jpg"),
    *("url", "image_url"),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "title", "description", "prompt")
DELIMITERS = ",;\t|"
HEADLESS = 20  # rows of a table without a head that are looked at for files
WEB = ("http://", "https://")
csv.field_size_limit(sys.maxsize)


class Columns(NamedTuple):
    """Names that the user gave; None: guessed."""

    image: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Table:
    """A table's path, and the columns that it is read by."""

    path: str
    columns: Columns
    encoding: str | None

    @property
    def local(self) -> Path:
        # Absolute: pyarrow takes data: in data:v1/x.parquet for a scheme.
        return storage.fetch(self.path).absolute()

    def beside(self, name: str) -> str:
        """The path of a picture that the table names."""
        if storage.is_remote(name) or os.path.isabs(name):  # noqa: PTH117
            return name
        return storage.join(self.path.rpartition("/")[0] or ".", name)

    def rows(self) -> Iterator[tuple[str, Any, Any]]:
        """Name, image and caption of each row, None where a cell is missing.

        Raises:
            DataError: the table cannot be read, or has no such columns.
        """
        read = {"parquet": _parquet_rows, "jsonl": _json_rows}.get(extension(self.path), _csv_rows)
        with faults_named(self.path):
            for number, (image, caption) in enumerate(read(self), 1):
                yield f"{self.path.rpartition('/')[2]} row {number}", image, caption

    def named(self, names: Sequence[str]) -> tuple[str, str]:
        """The columns of images and captions among `names`. Raises DataError."""
        return (
            self._column(names, self.columns.image, IMAGE_COLUMNS, "image"),
            self._column(names, self.columns.caption, CAPTION_COLUMNS, "caption"),
        )

    def _column(
        self, names: Sequence[str], given: str | None, usual: tuple[str, ...], what: str
    ) -> str:
        lower = {name.strip().lower(): name for name in reversed(names)}
        found = given if given in names else next((lower[n] for n in usual if n in lower), None)
        if found is None or (given is not None and found != given):
            raise DataError(
                f"{self.path}: no column of {what}s among {', '.join(names)}; "
                f"name one with --{what}-column"
            )
        return found


@contextlib.contextmanager
def faults_named(path: str) -> Iterator[None]:
    """What goes wrong while a table is read is a DataError that names it."""
    try:
        yield
    except (csv.Error, UnicodeError, pyarrow.ArrowException, OSError) as error:
        why = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read as a table ({why})") from None


def candidates(table: Table, skipped: Skipped) -> list[PictureFile]:
    """A candidate for each row; rows that cannot be one go to `skipped`.

    Raises:
        DataError: as `Table.rows`; or the table has nothing but addresses of the web.
    """
    keys, made, of_web = UniqueKeys(), list[PictureFile](), 0
    for row, image, caption in table.rows():
        if not isinstance(image, str) or not image.strip():
            skipped.append((row, "no image in this row"))
        elif image.startswith(WEB):
            of_web += 1
            skipped.append((printable(image), "an address of the web: fetch it with img2dataset"))
        else:
            made.append(_picture(table, keys, row, image.strip(), caption))
    if of_web and not made:
        raise DataError(
            f"{table.path}: holds addresses of images, not images; fetch them with img2dataset "
            "(--output_format webdataset), then build its folder of tars"
        )
    return made


def captions(table: Table) -> dict[str, str]:
    """Captions by the names of pictures, several of one as lines."""
    found: dict[str, list[str]] = {}
    for _, image, caption in table.rows():
        if isinstance(image, str):
            found.setdefault(image.strip(), []).append(caption_text(caption))
    return {name: "\n".join(texts) for name, texts in found.items()}


def _picture(table: Table, keys: UniqueKeys, row: str, image: str, caption: Any) -> PictureFile:
    stem = os.path.splitext(image.removeprefix("./"))[0]  # noqa: PTH122
    lot = key_of(stem.replace("://", "/").lstrip("/"))
    key, path = keys.unique(lot, f"{image} {row}"), table.beside(image)
    return PictureFile(key, lot, printable(image), path, caption_text(caption))


def caption_text(cell: Any) -> str:
    """A cell's caption, or captions as lines; "" where it holds none."""
    lines = cell if isinstance(cell, list) else [cell]
    return "\n".join(line for line in lines if isinstance(line, str))


def _csv_rows(table: Table) -> Iterator[tuple[Any, Any]]:
    with _opened(table) as file:
        head = file.readline()
        file.seek(0)
        tabs = extension(table.path) == "tsv"
        delimiter = "\t" if tabs else max(DELIMITERS, key=head.count)
        # Tab-separated captions are mostly written as they are, with quotes that do not end.
        quote = {"quoting": csv.QUOTE_NONE} if tabs else {"skipinitialspace": True}
        rows = csv.reader(file, delimiter=delimiter, **quote)
        ahead = list(itertools.islice(rows, HEADLESS))
        order = _headless(table, ahead) or _headed(table, [cell.strip() for cell in ahead.pop(0)])
        for cells in filter(None, itertools.chain(ahead, rows)):
            image, caption = (cells[i] if i < len(cells) else None for i in order)
            yield image, _unquoted(caption) if tabs else caption


def _headed(table: Table, names: list[str]) -> tuple[int, int]:
    image, caption = table.named(names)
    return names.index(image), names.index(caption)


def _headless(table: Table, rows: list[list[str]]) -> tuple[int, int] | None:
    """Numbers of the columns, where there are two, without names, and one has names of files."""
    if not rows:
        raise DataError(f"{table.path}: is empty")
    first = {cell.strip().lower() for cell in rows[0]}
    if len(rows[0]) != 2 or first & {*IMAGE_COLUMNS, *CAPTION_COLUMNS} or any(table.columns):
        return None
    files = [sum(_is_there(table, row[i]) for row in rows if len(row) == 2) for i in (0, 1)]
    return None if not any(files) else (0, 1) if files[0] >= files[1] else (1, 0)


def _is_there(table: Table, name: str) -> bool:
    try:
        return storage.is_remote(name) or os.path.isfile(table.beside(name))  # noqa: PTH113
    except (OSError, ValueError):  # a caption is no path: too long, or with NUL
        return False


def _unquoted(cell: str | None) -> str | None:
    """As it was before a program put it in quotes for the quotes in it."""
    inner = cell[1:-1] if cell and len(cell) > 1 and cell[0] == cell[-1] == '"' else None
    if inner is None or '"' in inner.replace('""', ""):
        return cell
    return inner.replace('""', '"')


def _json_rows(table: Table) -> Iterator[tuple[Any, Any]]:
    names: tuple[str, str] | None = None
    with _opened(table) as file:
        for line in filter(str.strip, file):
            try:
                tree = json.loads(line)
            except json.JSONDecodeError:
                tree = None
            if not isinstance(tree, dict):
                yield None, None
                continue
            names = names or table.named(list(tree))
            yield tree.get(names[0]), tree.get(names[1])


def _opened(table: Table) -> TextIO:
    """Bytes that are not in the encoding stay what they are, so that each costs its own row."""
    with table.local.open("rb") as file:
        start = file.read(4)
    marked = next((name for mark, name in MARKS if start.startswith(mark)), None)
    encoding = marked or table.encoding or "utf-8"
    return table.local.open(encoding=encoding, errors="surrogateescape", newline="")


def _parquet_rows(table: Table) -> Iterator[tuple[Any, Any]]:
    with pyarrow.parquet.ParquetFile(table.local) as file:
        names = table.named(file.schema_arrow.names)
        for batch in file.iter_batches(columns=list(dict.fromkeys(names))):
            yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)
