"""Every benchmark runs, tiny, and writes rows that say where they were measured."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_BE_ZERO = {
    "steps skipped",
    "by Householder, 20 steps",
    "gradient underflow, worst resblock",
    "gradient underflow, all resblocks",
    "error / exact distance",
    "a step with watch, more",
    "threads, of a processor",
    "all parts, of a step",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("train_step", {"training step", "speed", "GEMM peak", "share of GEMM peak"}),
        (
            "attention",
            {"forward", "forward + backward speed", "forward share of floor", "peak memory"},
        ),
        ("sampling", {"sampling", "one image", "step", "step time", "time"}),
        ("generate", {"one caption", "time", "peak memory beyond the model's"}),
        ("checkpoint", {"pause", "whole save", "load", "size"}),
        ("powersgd_math", {"layer shards", "ours, layer", "share of a step's FLOP"}),
        ("precision_cost", {"training step", "step time"}),
        ("dvae_step", {"training step", "speed"}),
        ("fid", {"features to distance", "time / ours", "error / exact distance"}),
        (
            "data",
            {"tokens", "tokens from S3", "images", "8 loader processes", "build, 64x64"},
        ),
        (
            "checkpoint_convert",
            {"to safetensors", "memory / fp32 weights", "its time / ours", "its memory / ours"},
        ),
        ("busy_machine", {"quiet", "beside one busy process"}),
        ("gradient_path", {"gradient path's host time", "operations of torch"}),
        ("plan", {"held, measured / plan", "checkpoint, measured / plan"}),
        ("on_paper", {"all-reduces of all ranks", "collectives between nodes"}),
        ("slurm_start", {"running to first step", "USR1 to the job's requeue"}),
        ("watch", {"a step with watch, more", "all parts, of a step"}),
        ("precision", {"held-out loss", "held-out loss / fp32's", "steps skipped"}),
    ],
)
def test_smoke_writes_rows(tmp_path, name, metrics):
    rows = smoke(name, tmp_path / "rows.csv")
    assert metrics <= {row["metric"] for row in rows}
    for row in rows:
        assert float(row["median"]) > 0 or row["metric"] in MAY_BE_ZERO
        assert row["hardware"] and row["torch"] and row["threads"] == "1"


def smoke(name, out, rounds=1):
    """The rows that a tiny run of a benchmark writes."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke", f"--rounds={rounds}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--threads=1", "--out", str(out)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode:
        pytest.fail(f"benchmarks.{name} ended with {run.returncode}: {run.stderr}")
    return rows_of(out)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
