"""Learning rate of train-clip: warm-up, then half a cosine (arXiv 2103.00020, 2.5)."""

from __future__ import annotations

from dalle_dist.config import CLIPTrainConfig
from dalle_dist.optim.dvae_schedule import cosine
from dalle_dist.optim.stateless import Stateless
from dalle_dist.optim.warmup import warmup_factor


class CosineSchedule(Stateless):
    """The rate by the optimizer step, counted from 1; it depends on nothing else."""

    def __init__(self, config: CLIPTrainConfig) -> None:
        self._config = config

    def rate(self, step: int) -> float:
        config = self._config
        return warmup_factor(step, config.warmup) * cosine(
            config.lr, config.lr_final, step - 1, config.lr_steps
        )
