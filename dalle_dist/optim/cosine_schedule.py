"""Learning rate of train-clip: warm-up, then half a cosine (arXiv 2103.00020, 2.5)."""

from __future__ import annotations

from typing import Any

from dalle_dist.config import CLIPTrainConfig
from dalle_dist.optim.dvae_schedule import cosine
from dalle_dist.optim.warmup import warmup_factor


class CosineSchedule:
    """The rate by the optimizer step, counted from 1; it depends on nothing else."""

    def __init__(self, config: CLIPTrainConfig) -> None:
        self._config = config

    def rate(self, step: int) -> float:
        config = self._config
        return warmup_factor(step, config.warmup) * cosine(
            config.lr, config.lr_final, step - 1, config.lr_steps
        )

    def observe(self, step: int, loss: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
