"""Schedules of stage 1: cosines of KL weight, temperature and learning rate (paper A.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dalle_dist.config import DVAETrainConfig
from dalle_dist.optim.stateless import Stateless
from dalle_dist.optim.warmup import warmup_factor


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at `steps`, then constant."""
    share = min(1.0, step / steps) if steps > 0 else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Rates:
    """What the schedules say for one step."""

    lr: float
    temperature: float
    kl_weight: float


class DVAESchedule(Stateless):
    """The schedules by the optimizer step, counted from 1; they depend on nothing else."""

    def __init__(self, config: DVAETrainConfig) -> None:
        self._config = config

    def at(self, step: int) -> Rates:
        config, done = self._config, step - 1
        return Rates(
            lr=warmup_factor(step, config.warmup)
            * cosine(config.lr, config.lr_final, done, config.lr_steps),
            temperature=cosine(
                config.temperature, config.temperature_final, done, config.temperature_steps
            ),
            kl_weight=cosine(0.0, config.kl_weight, done, config.kl_steps),
        )

    def rate(self, step: int) -> float:
        return self.at(step).lr
