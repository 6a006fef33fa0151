"""A figure with all that it depends on; many of them as a table, and as a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Figure:
    """One measured number.

    images       how many it is of
    candidates   generated images: each is the best of the first so many of its caption
    blur         radius, pixels
    halves       the same distance between two random halves of the reference images
    reference    what the distance is to
    network, fingerprint, preparation   setting of the features or the score
    note         what a reader must know to judge it
    """

    name: str
    value: float
    unit: str = ""
    images: int | None = None
    candidates: int | None = None
    blur: float | None = None
    halves: float | None = None
    reference: str = ""
    network: str = ""
    fingerprint: str = ""
    preparation: str = ""
    note: str = ""

    @property
    def title(self) -> str:
        """The name with what tells it from other figures of this name."""
        best = "" if self.candidates in (None, 1) else f", best of {self.candidates}"
        blur = "" if not self.blur else f", blur {self.blur:g}"
        return f"{self.name}{best}{blur}"

    @property
    def beside(self) -> str:
        """What is printed beside the value."""
        halves = "" if self.halves is None else f"two halves of the reference: {self.halves:.4g}"
        return "; ".join(part for part in (halves, self.note) if part)


def table(figures: Iterable[Figure]) -> list[tuple[str, str]]:
    """(title, value with its unit and what stands beside it)."""
    rows = []
    for figure in figures:
        value = f"{figure.value:.4g} {figure.unit}".strip()
        rows.append((figure.title, f"{value} ({figure.beside})" if figure.beside else value))
    return rows


def to_csv(figures: Iterable[Figure], common: Mapping[str, str]) -> bytes:
    """A line for each figure, with what all have in common: a line says all by itself."""
    buffer = io.StringIO()
    names = [field.name for field in fields(Figure)]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*names, *common])
    for figure in figures:
        writer.writerow([_cell(getattr(figure, name)) for name in names] + list(common.values()))
    return buffer.getvalue().encode()


def _cell(value: object) -> str:
    if value is None:
        return ""
    # Beyond six digits figures of different numbers of threads differ.
    return f"{value:.6g}" if isinstance(value, float) else str(value)
