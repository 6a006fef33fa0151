"""Contenders of powersgd_network.py, and the figures of what their ranks have measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import Measured
from benchmarks.powersgd_rank import TORCH_START, Outcome

LAST = 10  # losses that a mean is taken of
WARM_UP = TORCH_START + 1  # steps that are not timed; torch's first compressed one makes its Q
TIMED_EVERY = 3  # steps between DiLoCo's outer steps when they are timed; divides WARM_UP

Curves = dict[tuple[str, int], list[Outcome]]  # by contender and seed; of each rank
Timed = dict[tuple[int, str], list[Outcome]]  # by rate and contender; of each rank


@dataclass(frozen=True)
class Contender:
    name: str
    parallel: dict[str, Any] = field(default_factory=dict)
    hook: str = ""  # of torch's DDP; empty: our engine

    @property
    def every(self) -> int:
        """Steps from one outer step to the next; 1: all are alike."""
        return int(self.parallel.get("outer_every", 1))


def ours(comm_dtype: str) -> Contender:
    parallel = {"between_nodes": "powersgd", "comm_dtype": comm_dtype}
    return Contender(f"ours, {comm_dtype}", parallel)


def diloco(every: int, dtype: str) -> Contender:
    parallel = {"between_nodes": "diloco", "outer_every": every, "outer_dtype": dtype}
    return Contender(f"DiLoCo, H={every}, {dtype}", parallel)


DENSE = Contender("dense all-reduce", {"between_nodes": "dense"})
CONTENDERS = (
    DENSE,
    Contender("dense ZeRO-2 over all", {"between_nodes": "zero"}),
    Contender("DDP, fp16", hook="fp16"),
    Contender("DDP, torch's PowerSGD", hook="powerSGD"),
    ours("fp32"),
    ours("bf16"),
    ours("1-6-9"),
    diloco(10, "bf16"),
    diloco(50, "bf16"),
    diloco(50, "int8"),
)


def per_step(contender: Contender, values: Sequence[float]) -> list[float]:
    """What the timed steps took; an outer step's cost beyond an inner one's is spread over all."""
    counted = values[WARM_UP:]
    if contender.every == 1:
        return list(counted)
    outer = counted[TIMED_EVERY - 1 :: TIMED_EVERY]
    inner = [value for number, value in enumerate(counted, 1) if number % TIMED_EVERY]
    usual, every = statistics.median(inner), contender.every
    return [usual + (value - usual) / every for value in outer]


def figures(curves: Curves, timed: Timed) -> list[Measured]:
    rows: list[Measured] = []
    for rate in dict.fromkeys(rate for rate, _ in timed):
        seconds = {c.name: per_step(c, timed[rate, c.name][0].seconds) for c in CONTENDERS}
        rows += _at_rate(rate, seconds, timed)
        rows += _in_equal_time(rate, seconds, curves)
    return rows + _in_equal_steps(curves)


def _at_rate(rate: int, seconds: Mapping[str, Sequence[float]], timed: Timed) -> list[Measured]:
    """Time, processor time and megabytes of all, and what they are beside dense's."""
    rows = []
    dense = statistics.median(seconds[DENSE.name])
    whole = statistics.median(_sent(DENSE, timed[rate, DENSE.name]))
    for contender in CONTENDERS:
        name, ranks = contender.name, timed[rate, contender.name]
        times, sent = seconds[name], _sent(contender, ranks)
        processor = per_step(contender, ranks[0].cpu_seconds)
        rows += [
            Measured(name, f"step at {rate} Mbit/s", "s", times),
            Measured(name, f"speed at {rate} Mbit/s", "x dense", [dense / t for t in times]),
            Measured(name, f"processor time at {rate} Mbit/s", "s", processor),
            Measured(name, f"sent per step at {rate} Mbit/s", "MB", sent),
            Measured(
                name, f"bytes at {rate} Mbit/s", "% of dense", [100 * s / whole for s in sent]
            ),
        ]
    return rows


def _sent(contender: Contender, ranks: Sequence[Outcome]) -> list[float]:
    """Megabytes of a step in both directions together."""
    both = zip(ranks[0].sent_bytes, ranks[-1].sent_bytes, strict=True)
    return per_step(contender, [sum(pair) / 1e6 for pair in both])


def _in_equal_time(
    rate: int, seconds: Mapping[str, Sequence[float]], curves: Curves
) -> list[Measured]:
    """Of each seed, the loss when the fastest has made all of its steps."""
    seeds = dict.fromkeys(seed for _, seed in curves)
    usual = {name: statistics.median(times) for name, times in seconds.items()}
    steps = len(curves[DENSE.name, next(iter(seeds))][0].losses)
    budget = steps * min(usual.values())
    rows = []
    for name, time in usual.items():
        made = max(1, min(steps, round(budget / time)))
        losses = [_near(curves[name, seed][0].losses, made) for seed in seeds]
        rows.append(Measured(name, f"steps in equal time at {rate} Mbit/s", "steps", [made]))
        rows.append(Measured(name, f"loss in equal time at {rate} Mbit/s", "nats", losses))
    return rows


def _in_equal_steps(curves: Curves) -> list[Measured]:
    rows = []
    seeds = list(dict.fromkeys(seed for _, seed in curves))
    for name in dict.fromkeys(name for name, _ in curves):
        of_seeds = [curves[name, seed][0] for seed in seeds]
        dense = [curves[DENSE.name, seed][0].held_out for seed in seeds]
        steps = len(of_seeds[0].losses)
        losses = [_near(found.losses, steps) for found in of_seeds]
        held_out = [found.held_out for found in of_seeds]
        excess = [100 * (one / other - 1) for one, other in zip(held_out, dense, strict=True)]
        rows += [
            Measured(name, f"loss, steps to {steps}", "nats", losses),
            Measured(name, f"held-out loss after {steps} steps", "nats", held_out),
            Measured(name, "held-out loss over dense's", "%", excess),
        ]
    return rows


def _near(losses: Sequence[float], step: int) -> float:
    """Mean of the losses of the last steps up to this one."""
    return statistics.mean(losses[max(0, step - LAST) : step])
