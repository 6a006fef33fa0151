"""Ranks hear of one another, whatever goes wrong on one of them."""

import threading

import pytest
import wards

from dalle_dist.distributed import process_group
from dalle_dist.doctor.checks import Check, examine
from dalle_dist.doctor.meeting import Meeting
from dalle_dist.doctor.report import Report, Row, Verdict
from dalle_dist.testing import run_distributed


def broken(patient):
    if patient.ranks.rank == 1:
        raise ZeroDivisionError("two\nlines")
    patient.meeting.everywhere(lambda: None)  # rank 1 does not come here
    return [Row("odd", Verdict.OK, "fine")]


def examined(ranks, patience):
    wards.own_host(ranks.rank)
    sound = Check("sound", lambda patient: [Row("sound", Verdict.OK, "fine")])
    report = examine(None, ranks, checks=[Check("odd", broken), sound], patience=patience)
    return [row.texts for row in report.rows], report.failed


def test_an_exception_on_one_rank_is_a_row_and_the_others_go_on():
    first, second = run_distributed(examined, 2, 1.0)
    assert first == second
    rows, failed = first
    assert failed
    assert ("odd", "FAIL", "n1 (rank 1): ZeroDivisionError: two lines", "") in rows
    # Rank 1 missed a round of that check.
    assert rows[-1] == ("sound", "ok", "fine", "")


def hung(ranks):
    wards.own_host(ranks.rank)
    meeting = Meeting(ranks)
    never = threading.Event()
    left = meeting.everywhere(never.wait if ranks.rank == 2 else lambda: 7, within=0.5)
    after = meeting.everywhere(lambda: ranks.rank)
    meeting.close()
    return [(a.host, a.value, a.error) for a in left], [a.value for a in after]


def test_an_action_that_hangs_is_left_and_its_rank_goes_on():
    results = run_distributed(hung, 3)
    left, after = results[0]
    assert all(result == results[0] for result in results)
    assert left == [("n0", 7, ""), ("n1", 7, ""), ("n2", None, "has not ended after 0.5 s")]
    assert after == [0, 1, 2]


def silent(ranks):
    meeting = Meeting(ranks, patience=1.0)
    if ranks.rank == 1:
        return None
    first = meeting.everywhere(lambda: 1)
    second = meeting.everywhere(lambda: 2)
    return [a.error for a in first], [a.error for a in second], sorted(meeting.lost)


def test_a_rank_that_does_not_answer_is_lost_and_waited_for_once():
    first, second, lost = run_distributed(silent, 3)[0]
    assert first == ["", "has not answered in 1 s", ""]
    assert second == ["", "has not answered before", ""]
    assert lost == [1]


def test_ranks_are_named_by_host():
    meeting = Meeting(process_group.init())
    meeting.hosts = ["a", "a", "b"]
    assert meeting.named([2, 0, 1]) == "a (ranks 0, 1), b (rank 2)"
    meeting.hosts = [f"n{i}" for i in range(20)]
    assert meeting.named(range(20)).endswith("n7 (rank 7), ... 20 in all")


@pytest.mark.parametrize(
    ("verdicts", "failed", "line"),
    [
        ("ok skip", False, "ok"),
        ("ok warn", False, "ok, with 1 warning"),
        ("FAIL warn FAIL", True, "FAIL: 2 rows to repair first, 1 warning"),
    ],
)
def test_the_last_line_is_the_verdict_over_all(verdicts, failed, line):
    report = Report(tuple(Row("x", Verdict(v), "found " * 30) for v in verdicts.split()))
    assert report.failed == failed
    assert str(report).splitlines()[-1] == line
    assert max(map(len, str(report).splitlines())) < 100
