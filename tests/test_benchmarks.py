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
        (
            "attention",
            {"forward", "forward + backward speed", "forward share of floor", "peak memory"},
        ),
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


def test_a_wrong_rival_is_left_out_and_a_wrong_ours_refused(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    import dataclasses

    import torch
    from dalle_kernels.masks import AttentionMask

    from benchmarks import attention, attention_rivals

    mask = AttentionMask("column", 5, 6)
    qkv, grad = torch.randn(2, mask.tokens, 3, 1, 64), torch.randn(2, mask.tokens, 1, 64)
    ours = attention_rivals.ours(qkv, grad, mask, "cpu")
    rivals = [attention_rivals.boolean(qkv, grad, mask), attention_rivals.dense(qkv, grad, mask)]
    assert attention.checked([ours, *rivals], qkv, grad) == [ours, *rivals]

    def off(contender, attend):
        return dataclasses.replace(contender, attend=attend)

    def failing(*qkv):
        raise RuntimeError("no such kernel")

    # Dense attention in place of masked, gradients of another function, and no result at all.
    wrong = [
        off(rivals[0], rivals[1].attend),
        off(rivals[0], lambda *x: (y := rivals[0].attend(*x)) + 0.01 * (y - y.detach())),
        off(rivals[1], failing),
    ]
    capsys.readouterr()
    assert attention.checked([ours, *wrong], qkv, grad) == [ours]
    said = capsys.readouterr().out.splitlines()
    for line, reason in zip(said, ("output", "gradient", "no such kernel"), strict=True):
        assert reason in line
    with pytest.raises(SystemExit, match="ours is not timed: gradient"):
        skewed = off(ours, lambda x: (y := ours.attend(x)) + 0.01 * (y - y.detach()))
        attention.checked([skewed, *rivals], qkv, grad)


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_flex_is_given_the_mask(monkeypatch, kind):
    monkeypatch.syspath_prepend(ROOT)
    import torch
    from dalle_kernels.masks import AttentionMask

    from benchmarks import attention_rivals

    mask = AttentionMask(kind, 7, 6, kernel=5)
    order, back = attention_rivals.band_order(mask)
    state = torch.arange(mask.tokens)
    for rule in (attention_rivals.mask_mod(mask), attention_rivals.mask_table(mask, order)):
        allowed = rule(state, state, state[:, None], state[None, :])
        assert allowed[back][:, back].equal(mask.dense())


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
