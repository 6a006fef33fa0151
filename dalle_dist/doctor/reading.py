"""How fast each host reads the training set: a part of one shard, another one on each host."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

from dalle_dist import storage
from dalle_dist.data.shards import ShardIndex
from dalle_dist.data.shards.index import INDEX
from dalle_dist.doctor.meeting import HANGS
from dalle_dist.doctor.patient import NO_CONFIG, Patient, values_of
from dalle_dist.doctor.report import Row, Verdict
from dalle_dist.errors import DataError
from dalle_dist.storage import retry
from dalle_dist.storage.store import store_of

NAME = "read speed"
MOST, PART = 64 << 20, 8 << 20  # bytes
SECONDS = 2.0
FAR_BELOW = 0.5  # of the median


def reading(patient: Patient) -> list[Row]:
    """One row: the slowest host; those far below the median are named."""
    if patient.config is None:
        return [Row(NAME, Verdict.SKIP, NO_CONFIG)]
    meeting, leaders = patient.meeting, patient.meeting.leaders
    folder = storage.join(patient.data, "train")
    index = storage.join(folder, INDEX)
    there = meeting.on_main(lambda: storage.exists(index), HANGS)
    if not there.error and not there.value:
        return [Row(NAME, Verdict.SKIP, f"no shards at {folder} yet")]
    number = leaders.index(patient.ranks.rank) if patient.ranks.rank in leaders else 0
    answers = meeting.on(leaders, lambda: measure(folder, number), HANGS)
    rows, rates = patient.failures(NAME, [there, *answers]), values_of(answers)
    if not rates:
        return rows
    slow = far_below(rates)
    who = slow or [min(rates, key=lambda rank: rates[rank])]
    rate = rates[min(who, key=lambda rank: rates[rank])] / 1e6
    text = f"{rate:,.0f} MB/s, least on {meeting.named(who)}"
    text += f"; median {median(rates.values()) / 1e6:,.0f}"
    verdict = Verdict.WARN if slow else Verdict.OK
    return [*rows, Row(NAME, verdict, text, "about the same on all hosts")]


def far_below(rates: dict[int, float]) -> list[int]:
    """Those below half of the median. Of two, neither is known to be the odd one."""
    if len(rates) < 3:
        return []
    least = FAR_BELOW * median(rates.values())
    return [rank for rank, rate in rates.items() if rate < least]


def measure(folder: str, number: int) -> float:
    """Bytes per second, of a shard that `number` chooses. Raises DataError."""
    shards = ShardIndex.load(folder).shards
    shard = shards[number % len(shards)]
    own = "://" in shard.name or shard.name.startswith("/")
    path = storage.normal(shard.name if own else storage.join(folder, shard.name))
    done, start = 0, time.perf_counter()
    while done < min(MOST, shard.bytes) and time.perf_counter() - start < SECONDS:
        part = _part(path, done, min(done + PART, shard.bytes))
        if not part:
            raise DataError(f"{path}: ends at byte {done}, the index says {shard.bytes}")
        done += len(part)
    return done / (time.perf_counter() - start)


def _part(path: str, start: int, end: int) -> bytes:
    if storage.is_remote(path):
        return retry.call(lambda: store_of(path).read(path, start, end, "")).data
    try:
        with Path(path).open("rb") as file:
            file.seek(start)
            return file.read(end - start)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
