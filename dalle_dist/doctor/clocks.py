"""How far the hosts' clocks are apart.

All look for one message of rank 0 and read their clocks when they see it: what that takes, some
hundredths of a second, is the error of the measurement.
"""

from __future__ import annotations

import time

from dalle_dist.doctor.patient import Patient, grouped, values_of
from dalle_dist.doctor.report import Row, Verdict

NAME, GO = "clocks", "clocks-go"
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
    meeting.everywhere(lambda: None)  # now all are here
    answers = meeting.everywhere(lambda: _read(patient, leaders))
    rows, by_rank = patient.failures(NAME, answers), values_of(answers)
    middle = sorted(by_rank.values())[len(by_rank) // 2]
    offsets = {rank: read - middle for rank, read in by_rank.items()}
    rows += [
        _row(f"{seconds:+,.1f} s on {meeting.named([rank])}", abs(seconds))
        for rank, seconds in offsets.items()
        if abs(seconds) > WARN
    ]
    if rows:
        return rows
    most = max(map(abs, offsets.values()))
    hosts = len(grouped({rank: meeting.hosts[rank] for rank in by_rank}))
    text = f"one host: {_date()}" if hosts == 1 else f"{most:.2f} s apart at most, {hosts} hosts"
    return [_row(text, most)]


def _row(found: str, apart: float) -> Row:
    verdict = Verdict.FAIL if apart > FAIL else Verdict.WARN if apart > WARN else Verdict.OK
    return Row(NAME, verdict, found, f"within {WARN:g} s")


def _read(patient: Patient, leaders: list[int]) -> float | None:
    """This rank's clock when rank 0 says so, in seconds; None for ranks that are not asked."""
    board, ranks = patient.meeting.board, patient.ranks
    if ranks.rank not in leaders:
        return None
    if ranks.rank == 0:
        board.post(GO, True)
        return now()
    deadline = time.monotonic() + patient.meeting.patience
    while not board.posted(GO):
        if time.monotonic() > deadline:
            raise TimeoutError("heard nothing of rank 0")
        time.sleep(_PAUSE)
    return now()


def _date() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z")
