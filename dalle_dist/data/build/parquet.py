"""Images that lie in a Parquet table themselves, as Hugging Face's data sets have them."""

from __future__ import annotations

import bisect
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dalle_dist.data.build.captions import whole
from dalle_dist.data.build.keys import key_of
from dalle_dist.data.build.table import Table, caption_text, faults_named


@dataclass(frozen=True)
class ParquetRow:
    """A candidate (`samples.Candidate`): a row of a local table, by its number."""

    key: str
    name: str
    path: Path
    row: int
    columns: tuple[str, str]

    @property
    def lot(self) -> str:
        return self.key

    @property
    def identity(self) -> str:
        return "\0".join((self.key, *self.columns))

    def caption(self, _encoding: str | None) -> str:
        return whole(caption_text(self._cell(self.columns[1])))

    def image(self) -> bytes:
        cell = self._cell(self.columns[0])
        found = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(found, bytes):
            raise FileNotFoundError(0, "no image in this row")
        return found

    def _cell(self, column: str) -> Any:
        ends = _ends(self.path)
        group = bisect.bisect_right(ends, self.row)
        start = ends[group - 1] if group else 0
        return _group(self.path, group, self.columns).column(column)[self.row - start].as_py()


def rows_with_images(table: Table) -> list[ParquetRow] | None:
    """A candidate for each row; None where the table has paths of images."""
    with faults_named(table.path), pyarrow.parquet.ParquetFile(table.local) as file:
        columns = table.named(file.schema_arrow.names)
        kind, count = file.schema_arrow.field(columns[0]).type, file.metadata.num_rows
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        return None
    name = table.path.rpartition("/")[2]
    stem = key_of(name.removesuffix(".parquet"))
    return [
        ParquetRow(f"{stem}-{row:08d}", f"{name} row {row + 1}", table.local, row, columns)
        for row in range(count)
    ]


@functools.lru_cache(maxsize=4)
def _ends(path: Path) -> list[int]:
    """Rows before the end of each row group."""
    with pyarrow.parquet.ParquetFile(path) as file:
        groups = range(file.metadata.num_row_groups)
        return list(itertools.accumulate(file.metadata.row_group(i).num_rows for i in groups))


@functools.lru_cache(maxsize=1)
def _group(path: Path, number: int, columns: tuple[str, str]) -> pyarrow.Table:
    """The one that was read last: candidates of a unit come in the order of their rows."""
    with pyarrow.parquet.ParquetFile(path) as file:
        # One thread: processes are forked after this one has looked at a row.
        return file.read_row_group(number, columns=list(columns), use_threads=False)
