"""What the checks found: rows of one table, and a verdict over all."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

HEAD = ("check", "verdict", "found", "wanted")
FOUND = 58  # characters of a line of that column


class Verdict(Enum):
    """Of a row; a skipped check had nothing to look at, and says why."""

    OK = "ok"
    SKIP = "skip"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Row:
    """One line of the table: what was found, and what should have been."""

    check: str
    verdict: Verdict
    found: str
    wanted: str = ""

    @property
    def texts(self) -> tuple[str, str, str, str]:
        return self.check, self.verdict.value, self.found, self.wanted


@dataclass(frozen=True)
class Report:
    """The rows of all checks, equal on all ranks."""

    rows: tuple[Row, ...]

    @property
    def failed(self) -> bool:
        return any(row.verdict is Verdict.FAIL for row in self.rows)

    @property
    def verdict(self) -> str:
        """One line over all rows."""
        counts = {v: sum(row.verdict is v for row in self.rows) for v in Verdict}
        fails, warns = counts[Verdict.FAIL], counts[Verdict.WARN]
        if fails:
            return f"FAIL: {_counted(fails, 'row')} to repair first, {_counted(warns, 'warning')}"
        return "ok" + (f", with {_counted(warns, 'warning')}" if warns else "")

    def __str__(self) -> str:
        return "\n".join([*_lines(self.rows), "", self.verdict])


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    wide = max(len(text) for text in (HEAD[0], *(row.check for row in rows)))
    for check, verdict, found, wanted in [HEAD, *(row.texts for row in rows)]:
        # A path is copied from here: it stays whole.
        lines = textwrap.wrap(found, FOUND, break_on_hyphens=False, break_long_words=False)
        first, *rest = lines or [""]
        yield f"{check:{wide}}  {verdict:7}  {first:{FOUND}}  {wanted}".rstrip()
        yield from (f"{'':{wide}}  {'':7}  {line}" for line in rest)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
