"""Means between nodes beside the backward pass or after it, over a slow network; what is exposed.

Two nodes as in powersgd_network.py, ZeRO-3 in each, and as many tokens as make computing and
sending alike in time. Weights must come out alike, bit for bit. Exposed is what a step takes beyond
one on a network without a limit. Needs root and iproute2; elsewhere it says so and measures
nothing.
"""

from __future__ import annotations

import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import common, slow_network
from benchmarks.common import Measured
from benchmarks.powersgd_figures import WARM_UP, Contender
from benchmarks.powersgd_network import network_config, run, write_inputs
from benchmarks.powersgd_rank import Outcome
from dalle_dist.config import Config

RATES = {"dense": 100, "powersgd": 20}  # Mbit/s
BUCKETS = {"zero_optimization": {"reduce_bucket_size": 100_000}}
Found = dict[tuple[str, bool, bool], list[float]]  # seconds by method, limit, overlap


def main() -> None:
    options = common.arguments(__doc__, rounds=15)
    reason = slow_network.missing()
    if reason:
        print(f"backward_sends: not measured: {reason}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("backward_sends: terminated"))
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder:
        config = larger(network_config(options.smoke, Path(folder)), options.smoke)
        write_inputs(config)
        steps, threads = WARM_UP + options.rounds, max(1, options.threads // 2)
        for method, rate in RATES.items():
            for limit in (None, rate):
                ranks = run(contenders(method), config, limit, steps, threads, Path(folder))
                check(method, ranks)
                for overlap in (False, True):
                    seconds = ranks[name(method, overlap)][0].seconds[WARM_UP:]
                    found[method, limit is not None, overlap] = seconds
    common.report("backward_sends", config, figures(found), options)


def larger(config: Config, smoke: bool) -> Config:
    """64 + 256 tokens, ZeRO-3, buckets of about a matrix."""
    shape = config.transformer
    if not smoke:
        shape = replace(shape, text_tokens=64, image_grid=16)
    return replace(
        config,
        transformer=shape,
        dvae=replace(config.dvae, image_size=8 * shape.image_grid),
        train=replace(config.train, zero_stage=3, deepspeed=BUCKETS),
    )


def name(method: str, overlap: bool) -> str:
    return f"{method}, {'beside' if overlap else 'after'} the backward pass"


def contenders(method: str) -> list[Contender]:
    parallel = {"between_nodes": method, "comm_dtype": "bf16"}
    return [Contender(name(method, on), parallel | {"overlap": on}) for on in (False, True)]


def check(method: str, ranks: Mapping[str, Sequence[Outcome]]) -> None:
    late, early = (ranks[name(method, on)] for on in (False, True))
    if [(r.weights, r.losses) for r in late] != [(r.weights, r.losses) for r in early]:
        raise SystemExit(f"{method}: weights or losses depend on when gradients are sent")


def figures(found: Found) -> list[Measured]:
    rows = []
    for method, rate in RATES.items():
        exposed = {}
        for on in (False, True):
            free, slow = (found[method, limited, on] for limited in (False, True))
            case, usual = name(method, on), statistics.median(free)
            exposed[on] = statistics.median(slow) - usual
            rows += [
                Measured(case, "step without a limit", "s", free),
                Measured(case, f"step at {rate} Mbit/s", "s", slow),
                Measured(case, f"exposed at {rate} Mbit/s", "s", [t - usual for t in slow]),
            ]
        share = 100 * exposed[True] / exposed[False] if exposed[False] > 0 else 100.0
        rows.append(Measured(f"{method}, beside / after", "exposed", "%", [share]))
    return rows


if __name__ == "__main__":
    main()
