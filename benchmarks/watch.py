"""What watching costs a training step: steps with and without it, in turn, and its parts.

    python -m benchmarks.watch

Two ranks of one thread train a transformer; every tenth step is logged. Watched, a step tells the
watchdog what it does and takes the time of its forward pass, and a line of the log compares the
ranks by one all-reduce; the threads of watchdog and heartbeat run beside it. The ratio of the two
kinds of steps hangs on what else the machine does, so the parts are measured by themselves too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.common import (
    Measured,
    arguments,
    benchmark_config,
    benchmark_model,
    random_batch,
    report,
    seconds,
)
from dalle_dist.config import WatchConfig
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.testing import run_distributed
from dalle_dist.watch.watch import Watch

WORLD, LOG_EVERY, CALLS = 2, 10, 2_000


def main() -> None:
    options = arguments(__doc__, rounds=15)
    with tempfile.TemporaryDirectory() as folder:
        found = run_distributed(measure, WORLD, folder, options, timeout=3600)[0]
    rows = figures(found)
    options.threads = 1
    torch.set_num_threads(1)
    report("watch", benchmark_config(options.smoke), rows, options)


def figures(found: dict[str, list[float]]) -> list[Measured]:
    case = f"{WORLD} ranks of 1 thread"
    plain, watched = found["plain"], found["watched"]
    ratios = [100 * (w / p - 1) for w, p in zip(watched, plain, strict=True)]
    step = Measured(case, "a step without", "s", plain)
    parts = found["calls"][0] + found["compared"][0] / LOG_EVERY
    share = 100 * (parts / step.median + found["threads"][0])
    return [
        step,
        Measured(case, "a step with watch, more", "%", ratios),
        Measured(case, "calls of a step", "us", [1e6 * s for s in found["calls"]]),
        Measured(case, "comparison of ranks, a log line", "us", [1e6 * found["compared"][0]]),
        Measured(case, "threads, of a processor", "%", [100 * s for s in found["threads"]]),
        Measured(case, "all parts, of a step", "%", [share]),
    ]


class Training:
    """A model that two ranks train alike, a step at a time."""

    def __init__(self, ranks: Ranks, smoke: bool) -> None:
        config = benchmark_config(smoke)
        self.ranks, self.model = ranks, benchmark_model(config)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.batch = random_batch(config, 1)
        self.count = 0

    def step(self, watch: Watch | None) -> float:
        if watch is None:
            loss = self._loss()
        else:
            self.count += 1
            watch.now("step", self.count)
            with watch.own:
                loss = self._loss()
        self.optimizer.zero_grad()
        loss.backward()
        total = self.ranks.sum([loss.item()])[0]
        self.optimizer.step()
        if watch is not None:
            watch.own.add_step(0.0)
            if self.count % LOG_EVERY == 0:
                watch.logged({"loss": total} | watch.compared(1.0))
        return total

    def _loss(self) -> torch.Tensor:
        return self.model(*self.batch).total(self.model.config.train.text_loss)


def measure(ranks: Ranks, folder: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds, on one rank: of steps in turn, of the calls of one, of the threads in a second."""
    length = 0.5 if options.smoke else 20.0
    without = _processor(length)
    watch = _watch(ranks, folder)
    _check(ranks, watch, options)
    training, steps = Training(ranks, options.smoke), 1 if options.smoke else LOG_EVERY
    times: dict[str, list[float]] = {"plain": [], "watched": []}
    for number in range(options.rounds + 1):
        took = {"plain": 0.0, "watched": 0.0}
        for _ in range(steps):  # in turn, so that what else the machine does falls on both
            took["plain"] += seconds(lambda: training.step(None)) / steps
            took["watched"] += seconds(lambda: training.step(watch)) / steps
        if number:
            for name, value in took.items():
                times[name].append(value)
    parts = {
        "calls": [seconds(lambda: _calls(watch)) / CALLS for _ in range(5)],
        "compared": [_compared(watch)],
        "threads": [_processor(length) - without],
    }
    watch.__exit__(None, None, None)
    return times | parts


def _watch(ranks: Ranks, folder: str) -> Watch:
    run = SimpleNamespace(
        path=folder, folder=Path(folder), main=ranks.rank == 0, fence=lambda: None, say=print
    )
    watch = Watch(WatchConfig(), 10**6, ranks, run, alone=True)
    watch.opened()
    return watch


def _check(ranks: Ranks, watch: Watch, options: argparse.Namespace) -> None:
    """Exit unless watched steps are the same, bit for bit."""
    losses = []
    for used in (None, watch):
        training = Training(ranks, options.smoke)
        losses.append([training.step(used) for _ in range(3)])
    if losses[0] != losses[1]:
        sys.exit(f"not timed: losses differ: {losses}")


def _calls(watch: Watch) -> None:
    for step in range(CALLS):
        watch.now("step", step)
        with watch.own:
            pass
        watch.own.add_step(0.0)


def _compared(watch: Watch) -> float:
    def lines() -> Any:
        for _ in range(100):
            watch.own.add_step(0.0)
            watch.compared(1.0)

    return seconds(lines) / 100


def _processor(length: float) -> float:
    """Seconds of a processor that this process takes in one second, while its main thread sleeps.

    Process groups have threads of their own that wake now and then.
    """
    began = time.process_time()
    time.sleep(length)
    return (time.process_time() - began) / length


if __name__ == "__main__":
    main()
