"""Training over a slow network between two nodes: steps per second, bytes, loss; and rivals'.

Two network namespaces stand for the nodes, `tc tbf` for the network, gloo for its library,
captions and codes in token shards for the data. PowerSGD's rank leaves out what the paper's does
(86%). Needs root and iproute2; elsewhere it says so and measures nothing. Some 20 minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, slow_network
from benchmarks.common import Measured
from benchmarks.powersgd_rank import TORCH_START, Outcome
from dalle_dist.config import Config, from_dict, to_dict
from dalle_dist.data.shards import ShardWriter
from dalle_dist.text_tokenizer.bpe import train_tokenizer

RATES = (1000, 100)  # Mbit/s; the first is where losses are compared, which no rate changes
TRAINED = 40  # steps at the first rate; the mean loss of the ...
LAST = 10  # ... last ones is compared
WARM_UP = TORCH_START + 1  # steps that no rate counts; torch's first compressed one makes its Q
LIMIT = 400.0  # seconds that one contender may take
COLORS = ("red", "green", "blue", "black")
THINGS = ("heart", "car", "house", "tree")
NOISE = 0.1  # share of codes that the caption does not decide: the loss has a floor above 0

Results = dict[tuple[int, str], list[Outcome]]  # by rate and contender; of each rank


@dataclass(frozen=True)
class Contender:
    name: str
    parallel: dict[str, Any] = field(default_factory=dict)
    hook: str = ""  # of torch's DDP; empty: our engine
    trained: bool = True  # whether its loss is compared, after more steps than it takes to time


def ours(comm_dtype: str, trained: bool = True) -> Contender:
    parallel = {"between_nodes": "powersgd", "comm_dtype": comm_dtype}
    return Contender(f"ours, {comm_dtype}", parallel, trained=trained)


DENSE = Contender("dense all-reduce", {"between_nodes": "dense"})
CONTENDERS = (
    DENSE,
    Contender("dense ZeRO-2 over all", {"between_nodes": "zero"}, trained=False),
    Contender("DDP, fp16", hook="fp16"),
    Contender("DDP, torch's PowerSGD", hook="powerSGD"),
    ours("fp32", trained=False),
    ours("bf16"),
    ours("1-6-9"),
)


def main() -> None:
    options = common.arguments(__doc__, rounds=4)
    reason = slow_network.missing()
    if reason:
        print(f"powersgd_network: not measured: {reason}")
        return
    # An exit, unlike the signal's own end, takes the ranks and the namespaces away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("powersgd_network: terminated"))
    with tempfile.TemporaryDirectory() as folder:
        config = network_config(options.smoke, Path(folder))
        write_inputs(config)
        results = measure(config, options, Path(folder))
    check(results)
    common.report("powersgd_network", config, figures(results), options)


def network_config(smoke: bool, folder: Path) -> Config:
    """16 layers of width 512, 50 million values in matrices; few tokens: sending takes the time."""
    shape = {"width": 64, "heads": 1, "layers": 2} if smoke else {
        "width": 512, "heads": 8, "layers": 16,
    }  # fmt: skip
    return from_dict(
        {
            "name": "smoke" if smoke else "d512-l16",
            "paths": {"tokens": str(folder / "tokens"), "tokenizer": str(folder / "tokenizer")},
            "tokenizer": {"vocab_size": 300},
            "dvae": {"image_size": 32, "codebook_size": 16},
            "transformer": {
                **shape, "text_tokens": 8, "image_grid": 4, "conv_kernel": 3, "codebook_size": 16,
            },
            "train": {
                "precision": "fp32", "checkpoint_activations": False, "batch_size": 8,
                "micro_batch": 4, "lr": 7e-4, "warmup": 10,
            },
            # 48 of 512 sends 14.1% of a layer, as 112 of the paper's 496x3968 does.
            "parallel": {"local_world_size": 1, "rank": 6 if smoke else 48, "rank_of": "shard"},
        }
    )  # fmt: skip


def write_inputs(config: Config) -> None:
    """A tokenizer, and shards whose captions decide most codes: color above, thing below."""
    captions = [f"{color} {thing}" for color in COLORS for thing in THINGS]
    train_tokenizer(captions, config.tokenizer.vocab_size).save(config.paths.tokenizer)
    grid, random = config.dvae.grid, np.random.default_rng(0)
    meta = {
        "image_tokenizer": "none",
        "grid": grid,
        "codebook_size": config.transformer.codebook_size,
    }
    with ShardWriter(f"{config.paths.tokens}/train", "tokens", meta, 256) as writer:
        for number in range(64 * len(captions)):
            color, thing = divmod(number % len(captions), len(THINGS))
            codes = np.repeat(np.array([color, 4 + thing], np.uint16), grid * grid // 2)
            free = random.random(codes.shape) < NOISE
            codes[free] = random.integers(0, config.transformer.codebook_size, int(free.sum()))
            buffer = io.BytesIO()
            np.save(buffer, codes, allow_pickle=False)
            caption = captions[number % len(captions)].encode()
            files = {"npy": buffer.getvalue(), "txt": caption, "json": b"{}"}
            writer.write(f"{number:06}", files)


def measure(config: Config, options: argparse.Namespace, folder: Path) -> Results:
    short = WARM_UP + options.rounds
    results: Results = {}
    for rate in RATES[:1] if options.smoke else RATES:
        for contender in CONTENDERS:
            long = contender.trained and rate == RATES[0] and not options.smoke
            steps = max(short, TRAINED) if long else short
            found = run(contender, config, rate, steps, max(1, options.threads // 2), folder)
            results[rate, contender.name] = found
            seconds = statistics.median(found[0].seconds[WARM_UP:])
            print(f"{rate} Mbit/s, {contender.name}: {seconds:.3g} s per step", flush=True)
    return results


def run(
    contender: Contender, config: Config, rate: int, steps: int, threads: int, folder: Path
) -> list[Outcome]:
    tree = to_dict(config)
    tree["parallel"] |= contender.parallel
    job = {"config": tree, "hook": contender.hook, "steps": steps, "threads": threads}
    job["out"] = str(folder / "rank{rank}.json")
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "benchmarks.powersgd_rank", str(folder / "job.json")]
    local_world_size = config.parallel.local_world_size
    with slow_network.SlowNetwork(rate) as network:
        network.run(command, local_world_size, LIMIT)
    ranks = range(2 * local_world_size)
    return [Outcome(**json.loads((folder / f"rank{r}.json").read_text())) for r in ranks]


def check(results: Results) -> None:
    """Refuse to report contenders that do not train one model, or not the same one."""
    start = results[RATES[0], DENSE.name][0].losses[0]
    for (rate, name), ranks in results.items():
        where = f"{name} at {rate} Mbit/s"
        first = ranks[0]
        if any(rank.weights != first.weights or rank.losses != first.losses for rank in ranks):
            raise SystemExit(f"{where}: the ranks' weights or losses differ")
        if not all(math.isfinite(loss) for loss in first.losses):
            raise SystemExit(f"{where}: a loss is not finite")
        if not math.isclose(first.losses[0], start, rel_tol=1e-5):
            raise SystemExit(f"{where}: the first loss is {first.losses[0]}, dense's is {start}")
        other = results[RATES[0], name][0].losses[: len(first.losses)]
        if not np.allclose(first.losses, other, rtol=1e-3):
            raise SystemExit(f"{where}: losses depend on the rate")


def figures(results: Results) -> list[Measured]:
    rows: list[Measured] = []
    for rate in dict.fromkeys(rate for rate, _ in results):
        rows += _at_rate(rate, {c.name: results[rate, c.name] for c in CONTENDERS})
    trained = {c.name: results[RATES[0], c.name][0].losses for c in CONTENDERS if c.trained}
    return rows + _losses(trained)


def _at_rate(rate: int, found: Mapping[str, Sequence[Outcome]]) -> list[Measured]:
    """Rates and megabytes of all, and what they are beside dense's."""
    rows = []
    dense = found[DENSE.name]
    for name, ranks in found.items():
        times = ranks[0].seconds[WARM_UP:]
        rows.append(Measured(name, f"steps at {rate} Mbit/s", "1/s", [1 / t for t in times]))
        speed = [statistics.median(dense[0].seconds[WARM_UP:]) / t for t in times]
        rows.append(Measured(name, f"speed at {rate} Mbit/s", "x dense", speed))
        processor = ranks[0].cpu_seconds[WARM_UP:]
        rows.append(Measured(name, f"processor time at {rate} Mbit/s", "s", processor))
    for name, ranks in found.items():
        sent = _sent(ranks)
        rows.append(Measured(name, f"sent per step at {rate} Mbit/s", "MB", sent))
        share = statistics.median(sent) / statistics.median(_sent(dense))
        rows.append(Measured(name, f"bytes at {rate} Mbit/s", "% of dense", [100 * share]))
    return rows


def _sent(ranks: Sequence[Outcome]) -> list[float]:
    """Megabytes of each counted step in both directions together."""
    ends = [ranks[0].sent_bytes[WARM_UP:], ranks[-1].sent_bytes[WARM_UP:]]
    return [sum(pair) / 1e6 for pair in zip(*ends, strict=True)]


def _losses(trained: Mapping[str, Sequence[float]]) -> list[Measured]:
    dense = statistics.mean(trained[DENSE.name][-LAST:])
    rows = []
    for name, losses in trained.items():
        last = losses[-LAST:]
        metric = f"loss, steps {len(losses) - len(last) + 1} to {len(losses)}"
        rows.append(Measured(name, metric, "nats", last))
        excess = 100 * (statistics.mean(last) / dense - 1)
        rows.append(Measured(name, "mean of them over dense's", "%", [excess]))
    return rows


if __name__ == "__main__":
    main()
