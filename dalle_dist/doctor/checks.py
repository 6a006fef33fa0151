"""All checks, in the order of the table, and the examination that runs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dalle_dist.config import Config
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.doctor import (
    batch,
    clocks,
    devices,
    folders,
    kernels,
    network,
    reading,
    sameness,
    space,
    versions,
)
from dalle_dist.doctor.meeting import PATIENCE, Meeting
from dalle_dist.doctor.patient import Patient
from dalle_dist.doctor.report import Report, Row, Verdict


@dataclass(frozen=True)
class Check:
    """A check by its name in the table.

    look  makes its rows; every rank calls it, and what one rank does alone stands in a round of the
          patient's meeting. Rank 0's rows count.
    slow  takes seconds: --quick leaves it out
    """

    name: str
    look: Callable[[Patient], list[Row]]
    slow: bool = False


def present(patient: Patient) -> list[Row]:
    """One row; the ranks that have not come are named as far as they are known."""
    name, meeting, ranks = "ranks", patient.meeting, patient.ranks
    hosts = len(set(meeting.hosts))
    where = meeting.hosts[0] if hosts == 1 else f"{hosts} hosts"
    found = f"{ranks.world} on {where}, started by {ranks.launcher}"
    if ranks.world == 1:
        found = f"one, on {meeting.hosts[0]}"
    return patient.failures(name, meeting.opening) or [Row(name, Verdict.OK, found)]


CHECKS = (
    Check("ranks", present),
    Check("versions", versions.tested),
    Check("packages", versions.optional),
    Check("devices", devices.devices),
    Check("cores", devices.cores),
    Check("clocks", clocks.clocks),
    Check("same code", sameness.code),
    Check("same config", sameness.config),
    Check("batch", batch.batch),
    Check("attention", kernels.attention),
    Check("space", space.space),
    Check("run folder", folders.folders),
    Check("network", network.network, slow=True),
    Check("read speed", reading.reading, slow=True),
)


def examine(
    config: Config | None,
    ranks: Ranks,
    *,
    verb: str = "train",
    quick: bool = False,
    checks: Sequence[Check] = CHECKS,
    patience: float = PATIENCE,
    tell: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Run all checks; a collective call, with the same report on all ranks.

    What goes wrong inside a check is a row of it, and no rank waits for one that hangs.

    Args:
        config: None leaves out what needs one.
        verb: of the stage that is to run: train, train-dvae or train-clip.
        quick: leave out the checks that take seconds.
        patience: seconds that ranks wait for one another.
        tell: called on rank 0 before any rank leaves, since a launcher may end the others then.

    Raises:
        UserError: rank 0 does not answer.
    """
    meeting = Meeting(ranks, f"doctor-{next(_numbers)}", patience)
    patient = Patient(config, meeting, verb)
    chosen = [check for check in checks if not (quick and check.slow)]
    report = Report(tuple(row for check in chosen for row in _rows(check, patient)))
    meeting.on_main(lambda: tell(report))
    meeting.close()
    return report


def _rows(check: Check, patient: Patient) -> list[Row]:
    answers = patient.meeting.everywhere(lambda: [row.texts for row in check.look(patient)])
    found = [
        Row(name, Verdict(verdict), *texts) for name, verdict, *texts in answers[0].value or ()
    ]
    return patient.failures(check.name, answers) + found


_numbers = itertools.count()  # of a process' examinations
