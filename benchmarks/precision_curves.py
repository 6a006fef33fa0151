"""What the precision benchmark records of a run, for its figures and its plots."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


@dataclass
class Curve:
    """What was recorded of a run: by step, and by probe and resblock."""

    losses: dict[int, float] = field(default_factory=dict)
    scales: dict[int, list[float]] = field(default_factory=dict)
    underflow: list[list[float]] = field(default_factory=list)
    error: list[list[float]] = field(default_factory=list)
    skipped: int = 0
    held_out: float = 0.0


def means(probes: list[list[float]]) -> list[float]:
    """Of each resblock, over all probes."""
    return [statistics.fmean(of_block) for of_block in zip(*probes, strict=True)]
