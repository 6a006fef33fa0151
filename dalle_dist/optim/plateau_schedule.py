"""Learning rate of stage 2: linear warm-up, then halvings by hand or at plateaus (paper B.2)."""

from __future__ import annotations

from typing import Any

from dalle_dist.config import TrainConfig
from dalle_dist.optim.warmup import warmup_factor


class PlateauSchedule:
    """Rate of each step, from the losses seen before it; steps count from 1.

    Without `halve_at`, the training loss is averaged over windows of `plateau_window` steps
    after the warm-up; a window whose mean is not lower than the one before by the share
    `plateau_gain` halves the rate. The window that follows a halving is only compared with later
    ones: its fall is the halving's doing.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self.halvings = 0
        self._seen = 0
        self._sum = 0.0
        self._previous: float | None = None

    def rate(self, step: int) -> float:
        """Learning rate of `step`."""
        config = self._config
        halvings = self.halvings
        if config.halve_at:
            halvings = sum(step > at for at in config.halve_at)
        warmup = warmup_factor(step, config.warmup)
        return config.lr * warmup * 0.5 ** min(halvings, config.halvings)

    def observe(self, step: int, loss: float) -> None:
        """Take note of the training loss (nats, the same on all ranks) of a finished step."""
        if self._config.halve_at or step <= self._config.warmup:
            return
        self._seen += 1
        self._sum += loss
        if self._seen < self._config.plateau_window:
            return
        mean = self._sum / self._seen
        stalled = self._previous is not None and mean > self._previous * (
            1 - self._config.plateau_gain
        )
        self._previous = None if stalled else mean
        if stalled and self.halvings < self._config.halvings:
            self.halvings += 1
        self._seen, self._sum = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "halvings": self.halvings,
            "seen": self._seen,
            "sum": self._sum,
            "previous": self._previous,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.halvings, self._previous = state["halvings"], state["previous"]
        self._seen, self._sum = state["seen"], state["sum"]
