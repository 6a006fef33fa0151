"""Every benchmark runs, checks itself first, and writes rows that say where they were measured."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("train_step", {"training step", "speed", "GEMM peak", "share of GEMM peak"}),
        ("sampling", {"sampling", "one image", "step", "step time", "time"}),
        ("powersgd_math", {"layer shards", "ours, layer", "share of a step's FLOP"}),
    ],
)
def test_smoke_writes_rows(tmp_path, name, metrics):
    out = tmp_path / "rows.csv"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke", "--rounds=1", "--threads=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(2):
        run = subprocess.run(
            [*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert metrics <= {row["metric"] for row in rows}
    assert len(rows) % 2 == 0, "a second run appends as many rows, under one header"
    for row in rows:
        assert float(row["median"]) > 0
        assert row["hardware"] and row["torch"] and row["threads"] == "1"


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import torch
    from dalle_kernels.sparse_attention import api

    from benchmarks import common, train_step

    config = common.benchmark_config(smoke=True)
    model = common.benchmark_model(config)
    batch = common.random_batch(config, 1)
    train_step.check(model, *batch)
    right = api.BACKENDS["cpu"]

    class Skewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    monkeypatch.setitem(api.BACKENDS, "cpu", lambda qkv, mask: Skewed.apply(right(qkv, mask)))
    with pytest.raises(SystemExit, match="gradients differ"):
        train_step.check(model, *batch)


def test_a_lossy_powersgd_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import torch

    from benchmarks import powersgd_math
    from dalle_dist.distributed import factors, launch

    device = launch.init().device
    powersgd_math.check_ours([(32, 256)] * 2, 8, device)
    right = factors.orthonormal_BMR
    monkeypatch.setattr(factors, "orthonormal_BMR", lambda p: right(torch.flip(p, [0])))
    with pytest.raises(SystemExit, match="our output differs"):
        powersgd_math.check_ours([(32, 256)] * 2, 8, device)
