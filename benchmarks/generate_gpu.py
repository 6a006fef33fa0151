"""Generating image tokens of `1b` on a GPU: images per second, and the share of the memory's floor.

    python -m benchmarks.generate_gpu

The memory's floor of a step is the time to read what it must: all weights once, the text's keys and
values of the one caption, and of each image those that its masks show, on average over the
positions. With hundreds of candidates the products of the weights take longer than that. Rates are
those of `attention_gpu.PEAKS`. Random weights: they do not change the time.
Before anything is timed, the graph must give the tokens that steps from the host give.
"""

from __future__ import annotations

from functools import partial

import torch
from dalle_kernels.masks import AttentionMask

from benchmarks import common
from benchmarks.attention_gpu import PEAKS, Peak
from benchmarks.common import Measured
from dalle_dist.config import HEAD_DIM, Config, load
from dalle_dist.generate.sampler import Draw
from dalle_dist.generate.sampling_options import Sampling
from dalle_dist.generate.sequential import State, sample_sequence
from dalle_dist.transformer.layout import layer_masks
from dalle_dist.transformer.model import Transformer

CANDIDATES = (1, 64, 512)
DTYPE, CHECKED = torch.bfloat16, 24  # tokens whose equality is checked
SMOKE = [
    "transformer.layers=2",
    "transformer.width=128",
    "transformer.heads=2",
    "transformer.text_tokens=16",
    "transformer.image_grid=8",
    "transformer.conv_kernel=3",
    "dvae.image_size=64",
]


def main() -> None:
    options = common.arguments(__doc__, rounds=3)
    config = load("1b", SMOKE if options.smoke else [])
    with torch.device("cuda"):
        model = common.benchmark_model(config).eval().requires_grad_(False)
    model.blocks.to(DTYPE)
    rows = []
    for samples in CANDIDATES:
        rows += figures(model, config, samples, options.rounds)
    common.report("generate", config, rows, options, "cuda")


@torch.no_grad()
def figures(model: Transformer, config: Config, samples: int, rounds: int) -> list[Measured]:
    """Rates of `samples` images of one caption, one token of each per step."""
    text_BT = common.random_batch(config, batch=1)[0].cuda().expand(samples, -1)
    draw = Draw(model, text_BT, list(range(samples)), Sampling())
    check(draw)
    torch.cuda.reset_peak_memory_stats()
    times = common.interleaved({"": partial(seconds, draw)}, rounds)[""]
    peak = torch.cuda.max_memory_allocated() / 2**20
    steps, case = [t / draw.tokens for t in times], f"{samples} candidates"
    rows = [
        Measured(case, "images", "images/s", [samples / t for t in times]),
        Measured(case, "step", "ms", [1e3 * t for t in steps]),
        Measured(case, "peak memory", "MiB", [peak]),
    ]
    rates = PEAKS.get(torch.cuda.get_device_name())
    if rates is None:  # a GPU whose rates nobody has looked up
        return rows
    floor = memory_seconds(model, config, samples, rates)
    either = max(floor, product_seconds(model, samples, rates))
    return [
        *rows,
        Measured(case, "share of the memory's floor", "x", [floor / t for t in steps]),
        Measured(case, "share of memory's or products' floor", "x", [either / t for t in steps]),
    ]


def seconds(draw: Draw) -> None:
    """One whole batch, waited for."""
    sample_sequence(draw)
    torch.cuda.synchronize()


def check(draw: Draw) -> None:
    """Refuse to time a graph whose tokens differ from those of steps started one by one."""
    codes_BN, state = sample_sequence(draw), State(draw)
    for position in range(min(CHECKED, draw.tokens)):
        state.step(position)
    if not codes_BN[:, :CHECKED].equal(state.codes_BN[:, :CHECKED]):
        raise SystemExit("tokens differ; nothing is timed")


def memory_seconds(model: Transformer, config: Config, samples: int, rates: Peak) -> float:
    """Seconds that a step's bytes take."""
    shape = config.transformer
    read = [*model.blocks.parameters(), *model.image_unembedding.parameters()]
    number = 2 * shape.heads * HEAD_DIM * DTYPE.itemsize  # a token's key and value in one layer
    tokens = sum(shape.text_tokens + samples * keys(mask) for mask in layer_masks(shape))
    return (sum(p.nbytes for p in read) + tokens * number) / rates.bytes


def product_seconds(model: Transformer, samples: int, rates: Peak) -> float:
    """Seconds that the resblocks' matrix products take."""
    return 2 * sum(p.numel() for p in model.blocks.parameters()) * samples / rates.flops


def keys(mask: AttentionMask) -> float:
    """Image keys that a query looks at, its own included, on average."""
    scan = torch.arange(mask.image)
    return int(mask.visible(scan[:, None], scan[None]).sum()) / mask.image


if __name__ == "__main__":
    main()
