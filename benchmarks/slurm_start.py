"""How long a Slurm job takes to its first step, and from a signal to its place in the queue.

    python -m benchmarks.slurm_start

A Slurm of two nodes on this machine, of its own and on loopback, starts a model of the demo's size
on one rank each. What a job needs beside the bare import of torch and DeepSpeed, which is measured
in turn with it, is ours. Root and Debian's slurm-wlm and munge are needed; they are installed if
need be.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Measured, arguments, report
from dalle_dist.config import Config
from tests import tiny_run
from tests.slurm.cluster import NODES, Cluster, install, until

SITE = """date +%s.%N >"$BEGAN"
"""
DEMO = {"layers": 6, "width": 192, "heads": 3, "text_tokens": 16}
STEPS = 100_000  # more than there is time for


def main() -> None:
    options = arguments(__doc__, rounds=5)
    reason = install()
    if reason:
        raise SystemExit(f"no Slurm here: {reason}")
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "cluster").mkdir()
        cluster = Cluster(place / "cluster")
        try:
            cluster.start()
            config = configured(place, options.smoke)
            for number in range(options.rounds):
                for name, seconds in one_round(cluster, place / str(number), config).items():
                    found.setdefault(name, []).append(seconds)
        finally:
            cluster.stop()
    rows = [Measured("2 loopback nodes", name, "s", values) for name, values in found.items()]
    report("slurm_start", config, rows, options)


def configured(place: Path, smoke: bool) -> Config:
    config = tiny_run.make(
        place, steps=STEPS, save_every=STEPS, eval_every=STEPS, sample_every=0, prompts=[]
    )
    if smoke:
        return config
    from dalle_dist.config import from_dict, to_dict

    tree: dict[str, Any] = to_dict(config)
    tree["transformer"] |= DEMO
    return from_dict(tree | {"name": "tiny data, the demo's transformer"})


def one_round(cluster: Cluster, place: Path, config: Config) -> dict[str, float]:
    """Seconds of each part, once."""
    place.mkdir()
    imports = imported(cluster)
    without = started(cluster, place / "without", config, "0")
    with_doctor = started(cluster, place / "with", config, "full")
    first = without["first step"]
    return {
        "bare import on both nodes": imports,
        "submitted to running": without["running"],
        "running to first step": first,
        "of it ours": first - imports,
        "the same after doctor": with_doctor["first step"],
        "of it ours, doctor's import left out too": with_doctor["first step"] - 2 * imports,
        "USR1 to the job's requeue": without["requeue"],
    }


def imported(cluster: Cluster) -> float:
    began = time.perf_counter()
    nodes = ["srun", *NODES, sys.executable, "-c"]
    cluster.run(*nodes, "import torch, deepspeed")
    whole = time.perf_counter() - began
    began = time.perf_counter()
    cluster.run(*nodes, "pass")
    return whole - (time.perf_counter() - began)


def started(cluster: Cluster, place: Path, config: Config, doctor: str) -> dict[str, float]:
    """Submit a run of its own, and end it after its first steps by USR1."""
    place.mkdir()
    path = tiny_run.write_config(
        tiny_run.with_paths(config, run=str(place / "run")), place / "config.yaml"
    )
    began, site, out = place / "began", place / "site.sh", place / "out"
    site.write_text(SITE)
    variables = {
        "BEGAN": str(began), "DALLE_DIST_SITE": str(site), "DALLE_DIST_DOCTOR": doctor,
        "DALLE_DIST_LOGS": str(place),
    }  # fmt: skip
    submitted = time.time()
    job = cluster.submit(*NODES, f"--output={out}", "slurm/train.sbatch", path, **variables)
    log = place / "run/log.jsonl"
    until(lambda: losses(log), 120, "the first step")
    running, first = float(began.read_text()), losses(log)[0]
    signalled = time.time()
    cluster.run("scancel", "--signal=USR1", job)
    until(lambda: f"requeueing job {job}" in out.read_text(), 60, "the requeue")
    requeued = time.time()
    cluster.run("scancel", job)
    until(lambda: cluster.state(job) in ("CANCELLED", "UNKNOWN"), 60, "the job's end")
    if not list((place / "run/checkpoints").glob("step-*/manifest.json")):
        raise SystemExit("the job went back into the queue without a checkpoint")
    return {
        "running": running - submitted,
        "first step": first - running,
        "requeue": requeued - signalled,
    }


def losses(log: Path) -> list[float]:
    """When each line with a loss was written."""
    lines = log.read_text().splitlines(True) if log.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line["time"] for line in whole if "loss" in line]


if __name__ == "__main__":
    main()
