"""Plans against tensors alive and bytes sent in real processes; all of it: benchmarks/plan.py."""

from dataclasses import replace

import pytest

from benchmarks import plan_measured
from dalle_dist.config import load
from dalle_dist.plan.hardware import hardware
from dalle_dist.plan.items import Layout, total
from dalle_dist.plan.plan import plan
from dalle_dist.testing import run_distributed

SMALL = [
    "train.batch_size=8", "train.micro_batch=2", "transformer.layers=3", "transformer.width=128",
    "transformer.heads=2", "transformer.text_tokens=32", "transformer.image_grid=8",
    "train.prompts=[]", "parallel.rank=16",
    "train.deepspeed={zero_optimization: {reduce_bucket_size: 200000}}",
]  # fmt: skip
WITHIN = 0.05


@pytest.mark.parametrize(
    ("nodes", "gpus", "overrides"),
    [
        (1, 1, ["train.zero_stage=0", "train.precision=fp32"]),
        (1, 2, ["train.zero_stage=2", "train.precision=bf16"]),
        (
            2,
            1,
            [
                "train.zero_stage=2", "train.precision=fp32", "parallel.between_nodes=powersgd",
                "parallel.local_world_size=1", "parallel.error_dtype=1-6-9",
            ],
        ),
        (
            2,
            2,
            [
                "train.zero_stage=3", "train.precision=bf16", "parallel.between_nodes=powersgd",
                "parallel.local_world_size=2", "train.moments=16-bit",
                "train.checkpoint_activations=true", "transformer.layers=8",
                "transformer.width=256", "transformer.heads=4",
            ],
        ),
        (
            1,
            2,
            [
                "train.zero_stage=3", "train.precision=fp16", "train.checkpoint_activations=true",
                "transformer.width=256", "transformer.heads=4",
            ],
        ),
    ],
)  # fmt: skip
def test_memory_and_bytes_are_those_of_real_processes(nodes, gpus, overrides):
    config = load("emoji", [*SMALL, *overrides])
    cpu = replace(hardware("h100-80"), device="cpu")
    made = plan(config, Layout(nodes, gpus), cpu)
    seen = run_distributed(plan_measured.watch, nodes * gpus, config)
    assert total(made.memory.held) == pytest.approx(max(s.held for s in seen), rel=WITHIN)
    assert made.memory.total == pytest.approx(max(s.peak for s in seen), rel=WITHIN)
    sent = total(made.traffic.inside) + total(made.traffic.between)
    assert sent == pytest.approx(max(s.sent for s in seen), rel=WITHIN, abs=1000)
