"""Training over a slow network between two nodes: time, bytes and loss; and rivals'.

Two network namespaces stand for the nodes, `tc tbf` for the network, gloo for its library,
captions and codes in token shards for the data. PowerSGD's rank leaves out what the paper's does
(86%). Losses depend on no rate: each contender trains without a limit, once for each seed, and a
few steps at each rate are timed. Needs root and iproute2; elsewhere it says so and measures
nothing. Some 20 minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import signal
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np

from benchmarks import common, slow_network
from benchmarks.powersgd_figures import (
    CONTENDERS,
    DENSE,
    TIMED_EVERY,
    WARM_UP,
    Contender,
    Curves,
    Timed,
    figures,
)  # fmt: skip
from benchmarks.powersgd_rank import Outcome
from dalle_dist.config import Config, from_dict, to_dict
from dalle_dist.data.shards import ShardWriter
from dalle_dist.text_tokenizer.bpe import train_tokenizer

RATES = (1000, 100)  # Mbit/s
TRAINED = 100  # steps that losses are compared after
SEEDS = (0, 1, 2)  # of weights, of the order of samples, and of PowerSGD's first Q
LIMIT = 1200.0  # seconds that all may take at one rate, or with one seed
COLORS = ("red", "green", "blue", "black")
THINGS = ("heart", "car", "house", "tree")
NOISE = 0.1  # share of codes that the caption does not decide: the loss has a floor above 0


def main() -> None:
    options = common.arguments(__doc__, rounds=6)
    reason = slow_network.missing()
    if reason:
        print(f"powersgd_network: not measured: {reason}")
        return
    # An exit, unlike the signal's own end, takes the ranks and the namespaces away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("powersgd_network: terminated"))
    with tempfile.TemporaryDirectory() as folder:
        config = network_config(options.smoke, Path(folder))
        write_inputs(config)
        curves, timed = measure(config, options, Path(folder))
    check(curves, timed)
    common.report("powersgd_network", config, figures(curves, timed), options)


def network_config(smoke: bool, folder: Path) -> Config:
    """4 layers of width 192, 2 million values in matrices; few tokens: sending takes the time."""
    shape = {"width": 64, "heads": 1, "layers": 2} if smoke else {
        "width": 192, "heads": 3, "layers": 4,
    }  # fmt: skip
    return from_dict(
        {
            "name": "smoke" if smoke else "d192-l4",
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
            # 18 of 192 sends 14.1% of a layer, as 112 of the paper's 496x3968 does.
            "parallel": {"local_world_size": 1, "rank": 6 if smoke else 18, "rank_of": "shard"},
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


def measure(config: Config, options: argparse.Namespace, folder: Path) -> tuple[Curves, Timed]:
    threads = max(1, options.threads // 2)
    rates, seeds = (RATES[:1], SEEDS[:1]) if options.smoke else (RATES, SEEDS)
    timed: Timed = {}
    steps = WARM_UP + TIMED_EVERY * max(1, options.rounds // TIMED_EVERY)
    often = [_more_often(contender) for contender in CONTENDERS]
    for rate in rates:
        print(f"{rate} Mbit/s", flush=True)
        found = run(often, config, rate, steps, threads, folder)
        timed |= {(rate, name): ranks for name, ranks in found.items()}
    trained = 2 * TIMED_EVERY if options.smoke else TRAINED
    return train(config, seeds, trained, threads, folder), timed


def train(config: Config, seeds: Sequence[int], steps: int, threads: int, folder: Path) -> Curves:
    """All seeds at a time: nothing is timed."""
    curves: Curves = {}
    stop = Event()

    def of_seed(seed: int) -> Curves:
        found = run(CONTENDERS, replace(config, seed=seed), None, steps, threads, folder, stop)
        return {(name, seed): ranks for name, ranks in found.items()}

    print(f"{steps} steps, with no limit", flush=True)
    with ThreadPoolExecutor() as pool:
        try:
            for found in pool.map(of_seed, seeds):
                curves |= found
        except BaseException:
            stop.set()
            raise
    return curves


def _more_often(contender: Contender) -> Contender:
    """Whose outer steps are seen in few steps."""
    if contender.every == 1:
        return contender
    return replace(contender, parallel=contender.parallel | {"outer_every": TIMED_EVERY})


def run(
    contenders: Sequence[Contender],
    config: Config,
    rate: int | None,
    steps: int,
    threads: int,
    folder: Path,
    stop: Event | None = None,
) -> dict[str, list[Outcome]]:
    """Outcomes of all ranks, by contender."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    tree, jobs = to_dict(config), []
    for number, contender in enumerate(contenders):
        of_it = tree | {"parallel": tree["parallel"] | contender.parallel}
        job = {"config": of_it, "hook": contender.hook, "name": contender.name}
        out = str(folder / f"{number}-rank{{rank}}.json")
        jobs.append(job | {"steps": steps, "threads": threads, "out": out})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "benchmarks.powersgd_rank", str(folder / "jobs.json")]
    local_world_size = config.parallel.local_world_size
    with slow_network.SlowNetwork(rate) as network:
        network.run(command, local_world_size, LIMIT, stop)
    return {
        job["name"]: [
            Outcome(**json.loads(Path(job["out"].format(rank=rank)).read_text()))
            for rank in range(2 * local_world_size)
        ]
        for job in jobs
    }


def check(curves: Curves, timed: Timed) -> None:
    """Refuse to report contenders that do not train one model, or not the same one."""
    for (name, seed), ranks in curves.items():
        _check_alike(f"{name}, seed {seed}", ranks, curves[DENSE.name, seed][0].losses[0])
    for (rate, name), ranks in timed.items():
        where = f"{name} at {rate} Mbit/s"
        _check_alike(where, ranks, timed[rate, DENSE.name][0].losses[0])
        until = min(TIMED_EVERY, len(ranks[0].losses))  # later DiLoCo's outer steps are others
        trained = curves[name, SEEDS[0]][0].losses[:until]
        if not np.allclose(ranks[0].losses[:until], trained, rtol=1e-3):
            raise SystemExit(f"{where}: losses depend on the rate")


def _check_alike(where: str, ranks: list[Outcome], start: float) -> None:
    first = ranks[0]
    if any(rank.weights != first.weights or rank.losses != first.losses for rank in ranks):
        raise SystemExit(f"{where}: the ranks' weights or losses differ")
    if not all(math.isfinite(loss) for loss in first.losses):
        raise SystemExit(f"{where}: a loss is not finite")
    if not math.isclose(first.losses[0], start, rel_tol=1e-5):
        raise SystemExit(f"{where}: the first loss is {first.losses[0]}, dense's is {start}")


if __name__ == "__main__":
    main()
