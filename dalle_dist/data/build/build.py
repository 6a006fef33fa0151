"""`dalle-dist data build` from beginning to end."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dalle_dist import storage
from dalle_dist.data.build.options import Options
from dalle_dist.data.build.plan import PARTS, Plan
from dalle_dist.data.build.report import Report
from dalle_dist.data.build.samples import Recipe
from dalle_dist.data.build.sources import plan_of
from dalle_dist.data.pool import make_units
from dalle_dist.data.shard_job import Job, Record
from dalle_dist.data.shards import ShardIndex
from dalle_dist.data.shards.index import RANDOM_LINE


def build(source: str, out: str, options: Options) -> None:
    """What `source` holds to shards in OUT/train and OUT/held-out, with a report on stdout.

    Raises:
        DataError: options or a source that make no sense, nothing usable for one of the parts, or
            an OUT that holds something else.
    """
    options.check()
    plan = plan_of(source, out, options)
    fix = "choose another --held-out or --seed"
    run(source, out, plan, options.recipe, fix, options.processes, options.part)


def run(
    source: str,
    out: str,
    plan: Plan,
    recipe: Recipe,
    fix: str,
    processes: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Make the shards of a plan, or the rest of them, and report.

    Args:
        fix: what helps when one of the parts is empty.
        processes: None: as many as there are cores.
    """
    meta: dict[str, Any] = {"source": Path(source).name, "size": recipe.size}
    if recipe.caption == "random":
        meta["captions"] = RANDOM_LINE
    job = Job(out, "images", meta, plan.units, plan.digest, PARTS)
    job.open()
    _make(job, plan, processes or len(os.sched_getaffinity(0)), part)
    reports: list[Report] = []

    def conclude(records: list[Record]) -> None:
        report = Report(plan, records)
        report.check(source, fix)
        report.write_skipped(out)
        reports.append(report)

    if not job.finish(conclude):
        print(f"{out}: part {part[0] + 1} of {part[1]} is done; others are not yet")
    elif reports:
        reports[0].print(out)
    else:
        train, held_out = (ShardIndex.load(storage.join(out, part)).samples for part in PARTS)
        print(f"{out}: {train} images to train on, {held_out} held out")


def _make(job: Job, plan: Plan, processes: int, part: tuple[int, int]) -> None:
    missing = job.missing(part)
    records = make_units(job, missing, processes)
    total = plan.samples if len(missing) == len(plan.units) else None
    try:
        with tqdm(total=total, unit="image", disable=not missing) as bar:
            for record in records:
                bar.update(record.note["used"] + len(record.note["skipped"]))
    except KeyboardInterrupt:
        print(f"{job.folder}: finished shards are kept; the same command goes on", file=sys.stderr)
        raise
