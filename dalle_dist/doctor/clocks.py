"""How far the hosts' clocks are apart.

Rank 0 reads its clock and sends a message; the others read theirs when they see it. What that takes
can only add to the difference, so the smallest of a few counts.
"""

from __future__ import annotations

import math
import time
from functools import partial

from dalle_dist.doctor.patient import Patient, values_of
from dalle_dist.doctor.report import Row, Verdict

NAME = "clocks"
TRIES = 3
# Logs of ranks can no longer be put in order, and the newest of two files is no longer told.
WARN = 1.0  # seconds
# No clock that is set by NTP at all is a minute off; stores refuse signed requests at 15.
FAIL = 60.0
_PAUSE = 0.005  # seconds between two looks


def now() -> float:
    return time.time()


def clocks(patient: Patient) -> list[Row]:
    """One row, and one for each host that is too far off the median; one rank of each is asked."""
    meeting = patient.meeting
    leaders = meeting.leaders
    ahead: dict[int, float] = {}
    rows: list[Row] = []
    for number in range(TRIES):
        meeting.everywhere(lambda: None)  # now all are here
        answers = meeting.everywhere(partial(_read, patient, leaders, f"go-{number}"))
        rows += patient.failures(NAME, answers)
        reads = values_of(answers)
        for rank, read in reads.items():
            ahead[rank] = min(read - reads[0], ahead.get(rank, math.inf))
    return rows or _judged(patient, ahead)


def _judged(patient: Patient, ahead: dict[int, float]) -> list[Row]:
    """Rows, by the seconds that each rank is ahead of rank 0."""
    meeting = patient.meeting
    middle = sorted(ahead.values())[len(ahead) // 2]
    offsets = {rank: seconds - middle for rank, seconds in ahead.items()}
    rows = [
        _row(f"{seconds:+,.1f} s on {meeting.named([rank])}", abs(seconds))
        for rank, seconds in offsets.items()
        if abs(seconds) > WARN
    ]
    if rows:
        return rows
    most = max(map(abs, offsets.values()))
    text = f"{most:.3f} s apart at most, {len(ahead)} hosts"
    if len(ahead) == 1:
        text = f"one host: {time.strftime('%Y-%m-%d %H:%M:%S %Z')}"
    return [_row(text, most)]


def _row(found: str, apart: float) -> Row:
    verdict = Verdict.FAIL if apart > FAIL else Verdict.WARN if apart > WARN else Verdict.OK
    return Row(NAME, verdict, found, f"within {WARN:g} s")


def _read(patient: Patient, leaders: list[int], key: str) -> float | None:
    """This rank's clock when rank 0 says so, in seconds; None for ranks that are not asked."""
    board, rank = patient.meeting.board, patient.ranks.rank
    if rank not in leaders:
        return None
    if rank == 0:
        before = now()
        board.post(key, True)
        return before
    deadline = time.monotonic() + patient.meeting.patience
    while not board.posted(key):
        if time.monotonic() > deadline:
            raise TimeoutError("heard nothing of rank 0")
        time.sleep(_PAUSE)
    return now()
