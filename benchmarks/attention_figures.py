"""What the attention benchmarks of CPUs and GPUs share: who may be timed, and the figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch

from benchmarks import attention_rivals
from benchmarks.attention_rivals import Contender
from benchmarks.common import Measured

KINDS = ("row", "column", "conv")


def checked(contenders: Sequence[Contender], *batch: torch.Tensor) -> list[Contender]:
    """Those that may be timed; says which may not, and refuses to go on without ours."""
    right = []
    for contender in contenders:
        fault = attention_rivals.fault(contender, *batch)
        if fault is None:
            right.append(contender)
        elif contender.family == "ours":
            raise SystemExit(f"{contender.mask.kind}: ours is not timed: {fault}")
        else:
            print(f"{contender.mask.kind}: {contender.name} is left out: {fault}")
    return right


def figures(
    label: str,
    metric: str,
    times: Mapping[str, Sequence[float]],
    families: Mapping[str, str],
    floor: float | None = None,
) -> list[Measured]:
    """Times, ours against the best of each family of rivals, and its share of `floor` seconds."""
    ours = times["ours"]
    rows = [
        Measured(f"{label}: {name}", metric, "ms", [1e3 * t for t in took])
        for name, took in times.items()
    ]
    for family in dict.fromkeys(families[name] for name in times if name != "ours"):
        best = quickest(times, [name for name in times if families[name] == family])
        ratios = [t / o for t, o in zip(times[best], ours, strict=True)]
        rows.append(Measured(f"{label}: ours / {best}", f"{metric} speed", "x", ratios))
    if floor is not None:
        share = [100 * floor / t for t in ours]
        rows.append(Measured(f"{label}: ours", f"{metric} share of floor", "%", share))
    return rows


def quickest(times: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    return min(names, key=lambda name: statistics.median(times[name]))
