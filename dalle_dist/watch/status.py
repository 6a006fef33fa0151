"""How a run stands, from what lies in its folder; torch is not needed for it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dalle_dist import storage
from dalle_dist.checkpoint.names import steps
from dalle_dist.errors import DataError, UserError
from dalle_dist.watch.heartbeat import NAME, read

GOING, OVER, WRONG = ("running",), ("stopped", "complete", "failed"), ("stalled", "failed")
STALE = 3  # heartbeats that may be missing
LATEST_BEAT = 60.0  # seconds that a heartbeat may be late in any case
LATEST_LINE = 600.0  # the same of a log line, where a run has no heartbeat
TREND = 10  # lines of the log whose loss is compared with that of as many before
Line = dict[str, Any]


@dataclass(frozen=True)
class Status:
    """How a run stands.

    state        running, stalled (its heartbeat has stopped), stopped, complete or failed
    seen         time of the last sign of life, in seconds of the epoch; 0 = none
    heartbeat    as in `heartbeat.json`; empty without one
    numbers      of the log's last line that has a loss
    trend        of the loss: change of its median over TREND lines; None where there are too few
    skipped      steps whose loss was not finite
    checkpoints  steps of those that are there
    released     whether there is a release
    trouble      the last lines of what went wrong
    """

    run: str
    state: str
    seen: float
    heartbeat: Line
    numbers: Line
    trend: float | None
    skipped: int
    checkpoints: list[int]
    released: bool
    trouble: list[str]


def status(run: str, now: float | None = None) -> Status:
    """Of a local or remote run, at this time or `now`.

    Raises DataError: there is no run, or a store does not answer.
    """
    run = storage.normal(run)
    if not storage.exists(storage.join(run, "config.yaml")):
        raise DataError(f"{run}: holds no run (no config.yaml); give the folder of one")
    heartbeat, lines = read(storage.join(run, NAME)), _log(run)
    losses = [line for line in lines if "loss" in line]
    seen = max([heartbeat.get("time", 0.0), *(line["time"] for line in lines[-1:])])
    return Status(
        run=run,
        state=_state(heartbeat, seen, time.time() if now is None else now),
        seen=seen,
        heartbeat=heartbeat,
        numbers=losses[-1] if losses else {},
        trend=trend([line["loss"] for line in losses if line["loss"] is not None]),
        skipped=sum("bad_samples" in line for line in lines),
        checkpoints=steps(storage.join(run, "checkpoints")),
        released=storage.exists(storage.join(run, "release/config.yaml")),
        trouble=_trouble(run, heartbeat, lines),
    )


def trend(losses: Sequence[float]) -> float | None:
    """How much the median of the last TREND losses is above that of the TREND before."""
    if len(losses) < 2 * TREND:
        return None
    last, before = losses[-TREND:], losses[-2 * TREND : -TREND]
    return statistics.median(last) - statistics.median(before)


def _state(heartbeat: Line, seen: float, now: float) -> str:
    if heartbeat.get("state") in OVER:
        return str(heartbeat["state"])
    every = heartbeat.get("every")
    allowed = max(STALE * every, LATEST_BEAT) if every else LATEST_LINE
    return "stalled" if now - seen > allowed else "running"


def _log(run: str) -> list[Line]:
    try:
        text = storage.read_bytes(storage.join(run, "log.jsonl")).decode()
    except (UserError, OSError):
        return []  # not begun
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # being written
            continue
    return lines


def _trouble(run: str, heartbeat: Line, lines: Sequence[Line]) -> list[str]:
    told = [
        f"step {line['step']}: the loss was not finite; samples: {'; '.join(line['bad_samples'])}"
        for line in lines
        if "bad_samples" in line
    ]
    watch = storage.join(run, "watch")
    told += [
        storage.read_bytes(storage.join(watch, name)).decode().strip()
        for name in storage.list_files(watch)[-2:]
    ]
    error = heartbeat.get("error")
    return [*[line for line in told[-3:] if line != error], *([error] if error else [])]
