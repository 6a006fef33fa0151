"""Whether every host can write the run folder, and whether it is one and the same folder."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from dalle_dist import storage
from dalle_dist.doctor.meeting import HANGS
from dalle_dist.doctor.patient import NO_CONFIG, Patient, values_of
from dalle_dist.doctor.report import Row, Verdict
from dalle_dist.errors import DataError
from dalle_dist.storage import retry
from dalle_dist.storage.store import store_of

NAME = "run folder"
PREFIX = ".doctor-"  # a run's upload leaves out names with a dot


def folders(patient: Patient) -> list[Row]:
    """Rows of what fails, or one that nothing does; nothing stays behind, no folder either."""
    if patient.config is None:
        return [Row(NAME, Verdict.SKIP, NO_CONFIG)]
    meeting, folder = patient.meeting, patient.run
    leaders = meeting.leaders
    token = meeting.on_main(lambda: secrets.token_hex(8)).value
    first = storage.join(folder, f"{PREFIX}{token}")
    missing = meeting.on_main(lambda: _missing(folder), HANGS).value or []
    try:
        written = meeting.on_main(lambda: _write(first, token), HANGS)
        answers = meeting.on(
            leaders[1:], lambda: _see_and_write(folder, first, token, meeting.ranks.rank), HANGS
        )
    finally:
        left = meeting.on_main(lambda: _clean(first, missing), HANGS)
    rows = patient.failures(NAME, [written if written.error else left, *answers])
    if not written.error:
        blind = [rank for rank, seen in values_of(answers).items() if not seen]
        rows += _unshared(patient, blind)
    hosts = f"by {len(leaders)} hosts" if len(leaders) > 1 else "written, read, deleted"
    return rows or [Row(NAME, Verdict.OK, f"{folder}: {hosts}", "written by all, and one")]


def _unshared(patient: Patient, blind: list[int]) -> Iterator[Row]:
    if blind:
        text = f"{patient.run} of rank 0 is not that of {patient.meeting.named(blind)}"
        yield Row(NAME, Verdict.FAIL, text, "a folder that all hosts share, or s3://")


def _see_and_write(folder: str, first: str, token: str, rank: int) -> bool:
    """Whether rank 0's file is there; and a file of this rank's own, written and deleted."""
    missing, own = _missing(folder), f"{first}-{rank}"
    try:
        seen = storage.exists(first) and _content(first) == token
        _write(own, token)
    finally:
        _clean(own, missing)
    return seen


def _write(path: str, token: str) -> None:
    """Written, flushed, renamed and read back. Raises DataError."""
    storage.write_bytes(path, token.encode())
    if _content(path) != token:
        raise DataError(f"{path}: holds something else than what was written to it")


def _content(path: str) -> str:
    """Past the cache, which would keep a copy."""
    if not storage.is_remote(path):
        return Path(path).read_text()
    return retry.call(lambda: store_of(path).read(path, 0, 64, "")).data.decode()


def _missing(folder: str) -> list[str]:
    """The folders that writing into it makes, the deepest first; none of a remote one."""
    if storage.is_remote(folder):
        return []
    path = Path(folder).absolute()
    return [str(p) for p in (path, *path.parents) if not p.exists()]


def _clean(path: str, missing: list[str]) -> None:
    with contextlib.suppress(NotADirectoryError):  # a file is in the way: nothing was written
        storage.remove(path)
    for folder in missing:
        with contextlib.suppress(OSError):  # somebody else has put something there
            Path(folder).rmdir()
