"""Cosine schedules of the dVAE's KL weight, temperature and step size (paper A.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dalle_dist.config import DVAETrainConfig


def cosine(start: float, end: float, update: int, updates: int) -> float:
    """Half a cosine from `start` at update 0 to `end` at `updates`, then constant."""
    share = min(1.0, update / updates) if updates > 0 else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Rates:
    """What the schedules say for one update."""

    lr: float
    temperature: float
    kl_weight: float


def rates(config: DVAETrainConfig, update: int) -> Rates:
    """Schedules at `update`, counted from 0; a warm-up, if any, is linear and multiplies the lr."""
    warmup = min(1.0, (update + 1) / config.warmup) if config.warmup else 1.0
    return Rates(
        lr=warmup * cosine(config.lr, config.lr_final, update, config.lr_steps),
        temperature=cosine(
            config.temperature, config.temperature_final, update, config.temperature_steps
        ),
        kl_weight=cosine(0.0, config.kl_weight, update, config.kl_steps),
    )
