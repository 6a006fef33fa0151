"""Sampling one image's tokens with the cache: images per minute, and time of a step by position.

Without a cache every token costs a pass over all positions before it. The plain dense-causal model
stands for that: passes are timed at a few positions, and the rest of the image is interpolated
between them. The training benchmark's model, batch 1, on the CPU.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import Tensor

from benchmarks import common, rivals
from benchmarks.common import Measured
from dalle_dist.generate.sampler import sample_codes
from dalle_dist.transformer.model import Transformer

POINTS = 5  # positions at which a pass without a cache is timed


def main() -> None:
    options = common.arguments(__doc__, rounds=3)
    config = common.benchmark_config(options.smoke)
    model = common.benchmark_model(config).eval()
    text_BT, codes_BN = common.random_batch(config, batch=1)
    check(model, text_BT, codes_BN)
    whole = [
        common.seconds(lambda: sample_codes(model, text_BT, [0])) for _ in range(options.rounds)
    ]
    passes = [step_seconds(model, text_BT, codes_BN) for _ in range(options.rounds)]
    # The quickest of all passes at each position: what else the machine does only adds.
    steps = [min(times) for times in zip(*passes, strict=True)]
    plain = rivals.PlainTransformer(config).eval()
    uncached = uncached_seconds(plain, text_BT, codes_BN, options.rounds)
    quarter = len(steps) // 4
    growth = statistics.median(steps[-quarter:]) / statistics.median(steps[:quarter])
    rows = [
        Measured("ours, cached", "sampling", "images/min", [60 / t for t in whole]),
        Measured("ours, cached", "one image", "s", whole),
        Measured("plain, no cache", "one image (interpolated)", "s", [uncached]),
        Measured("no cache / ours", "time", "x", [uncached / t for t in whole]),
        Measured("ours, cached", "step", "ms", [1e3 * t for t in steps]),
        Measured("last / first quarter", "step time", "x", [growth]),
    ]
    common.report("sampling", config, rows, options)


@torch.no_grad()
def check(model: Transformer, text_BT: Tensor, codes_BN: Tensor) -> None:
    """Refuse to time steps whose logits differ from the full forward's."""
    expected_BNK = model.logits(text_BT, codes_BN)[1]
    caches = model.prefill(text_BT, [1])
    held_B = torch.full_like(codes_BN[:, 0], model.image_embedding.start)
    for position in range(codes_BN.shape[1]):
        logits_BK = model.step(held_B[:, None], caches, position)[:, 0]
        torch.testing.assert_close(logits_BK, expected_BNK[:, position], rtol=1e-3, atol=1e-4)
        held_B = codes_BN[:, position]


@torch.no_grad()
def step_seconds(model: Transformer, text_BT: Tensor, codes_BN: Tensor) -> list[float]:
    """Seconds of each cached step, in order of position."""
    caches, times = model.prefill(text_BT, [1]), []
    for position in range(codes_BN.shape[1]):
        held_B = codes_BN[:, position]
        times.append(common.seconds(partial(model.step, held_B[:, None], caches, position)))
    return times


@torch.no_grad()
def uncached_seconds(
    model: rivals.PlainTransformer, text_BT: Tensor, codes_BN: Tensor, rounds: int
) -> float:
    """One image without a cache, by the trapezoid rule over POINTS timed positions."""
    last = codes_BN.shape[1] - 1
    positions = [last * i // (POINTS - 1) for i in range(POINTS)]
    cases = {str(p): partial(model.next_logits, text_BT, codes_BN[:, :p]) for p in positions}
    times = common.interleaved(cases, rounds)
    at = torch.tensor([statistics.median(times[str(p)]) for p in positions])
    return float(torch.trapezoid(at, torch.tensor(positions, dtype=torch.float)))


if __name__ == "__main__":
    main()
