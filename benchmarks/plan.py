"""Plans against real processes on this machine's CPUs: memory, bytes, checkpoint, seconds.

Each config trains on random tokens in as many processes as its plan has ranks. Ratios are of what
was measured to what was planned; `--smoke` takes two of the configs and no time.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import common
from benchmarks.common import Measured
from benchmarks.plan_measured import Seen, watch
from benchmarks.plan_rates import measured
from dalle_dist.config import Config, load
from dalle_dist.plan.hardware import Hardware, hardware
from dalle_dist.plan.items import Layout, total
from dalle_dist.plan.plan import Plan, plan
from dalle_dist.plan.shares import padded
from dalle_dist.testing import run_distributed

BYTES, SECONDS = 0.05, 0.25  # largest errors
SMALL = (
    "train.prompts=[]", "train.batch_size=16", "train.micro_batch=2", "transformer.text_tokens=64",
    "transformer.image_grid=16", "dvae.image_size=64", "transformer.conv_kernel=5",
    "transformer.layers=4", "transformer.width=256", "transformer.heads=4", "parallel.rank=32",
    "train.deepspeed={zero_optimization: {reduce_bucket_size: 1000000}}",
)  # fmt: skip
KEYS = {
    "zero": "train.zero_stage", "in": "train.precision", "again": "train.checkpoint_activations",
    "between": "parallel.between_nodes", "layers": "transformer.layers", "rank": "parallel.rank",
    "errors": "parallel.error_dtype", "wire": "parallel.comm_dtype", "moments": "train.moments",
    "batch": "train.batch_size",
}  # fmt: skip
# nodes x ranks of each, then keys.
CASES = (
    "1x1 zero=0 in=fp32 again=false",
    "1x1 zero=2 in=bf16 again=false width=512 layers=2",
    "1x1 zero=2 in=fp16 again=true width=384",
    "1x2 zero=0 in=bf16 again=false",
    "1x2 zero=1 in=fp32 again=true layers=8",
    "1x2 zero=1 in=bf16 again=false width=128",
    "1x2 zero=2 in=bf16 again=true width=512 layers=2",
    "1x2 zero=2 in=fp16 again=false",
    "1x2 zero=3 in=fp32 again=false layers=2 width=384",
    "1x2 zero=3 in=bf16 again=true layers=8",
    "2x1 zero=1 in=fp32 again=false between=dense",
    "2x1 zero=2 in=bf16 again=false between=powersgd rank=16",
    "2x1 zero=2 in=fp16 again=true between=powersgd wire=1-6-9 errors=1-6-9",
    "2x2 zero=3 in=bf16 again=true between=powersgd moments=16-bit width=512 layers=2 rank=64",
    "2x2 zero=2 in=fp32 again=false between=dense layers=2",
    "2x2 zero=3 in=fp16 again=true between=powersgd moments=16-bit errors=1-6-9",
)


def main() -> None:
    options = common.arguments(__doc__, rounds=3)
    rows, misses = [], []
    for case in CASES[:2] if options.smoke else CASES:
        config, layout = config_of(case)
        found, missed = compare(case, config, layout, options)
        rows += found
        misses += [f"{case}: {text}" for text in missed]
        print(case, " ".join(f"{row.metric} {row.median:.3f}" for row in found), flush=True)
    common.report("plan", load("emoji", list(SMALL)), rows, options)
    print("\n".join(["out of bounds:", *misses]) if misses else "all within bounds")


def config_of(case: str) -> tuple[Config, Layout]:
    ranks, *words = case.split()
    nodes, gpus = map(int, ranks.split("x"))
    overrides = [*SMALL, f"parallel.local_world_size={gpus}"]
    for word in words:
        key, _, value = word.partition("=")
        if key == "width":
            overrides += [f"transformer.width={value}", f"transformer.heads={int(value) // 64}"]
        else:
            overrides.append(f"{KEYS[key]}={value}")
    return load("emoji", overrides), Layout(nodes, gpus)


def compare(
    case: str, config: Config, layout: Layout, options: argparse.Namespace
) -> tuple[list[Measured], list[str]]:
    """Rows of measured / planned, and what is out of bounds."""
    rounds = 0 if options.smoke else options.rounds
    machine = hardware("h100-80") if options.smoke else _machine(config, layout)
    made = plan(config, layout, machine)
    with tempfile.TemporaryDirectory() as folder:
        seen = run_distributed(watch, layout.world, config, 3, rounds, Path(folder), timeout=600)
        saved = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    ratios = {**_ratios(made, seen), "checkpoint": saved / total(made.checkpoint)}
    bounds = dict.fromkeys(ratios, BYTES)
    if rounds:
        ratios["seconds"] = max(s.seconds for s in seen) / made.timing.seconds
        bounds["seconds"] = SECONDS
    rows = [Measured(case, f"{name}, measured / plan", "x", [r]) for name, r in ratios.items()]
    missed = [f"{n} {r:.3f}" for n, r in ratios.items() if abs(r - 1) > bounds[n]]
    return rows, missed


def _machine(config: Config, layout: Layout) -> Hardware:
    made = plan(config, layout, hardware("h100-80"))
    share = made.share
    own = int(padded(made.model, made.settings.stage, made.settings.shards))
    short = [min(shape) for shape in share.compressed]
    batch = (len(short), max(short), share.rank) if short and layout.nodes > 1 else (0, 0, 0)
    machine: Hardware = run_distributed(measured, layout.world, config, batch, own)[0]
    return machine


def _ratios(made: Plan, seen: list[Seen]) -> dict[str, float]:
    sent = max(s.sent for s in seen)
    planned = total(made.traffic.inside) + total(made.traffic.between)
    ratios = {
        "held": max(s.held for s in seen) / total(made.memory.held),
        "peak": max(s.peak for s in seen) / made.memory.total,
    }
    return ratios | ({"sent": sent / planned} if sent else {})


if __name__ == "__main__":
    main()
