"""Losses that leap away from those before them, and stay away."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from dalle_dist.config import WatchConfig

WINDOW = 200  # losses that a new one is compared with
FEWEST = 20  # of them, before one is judged
_SIGMA = 1.4826  # of a normal distribution, in median absolute deviations
_FLOOR = 0.005  # of the median: losses that hardly vary are no measure


class LossSpikes:
    """Judges each step's loss by the median of those before it; the same on all ranks.

    A loss is too high above the median by `settings.spike` standard deviations, which the median
    absolute deviation stands for, or where it is not finite. So many steps in a row make a spike.

    suspected  whether the last loss was too high
    """

    def __init__(self, settings: WatchConfig) -> None:
        self._above, self._needed = settings.spike, settings.spike_steps
        self._calm: deque[float] = deque(maxlen=WINDOW)
        self._high: list[float] = []

    @property
    def suspected(self) -> bool:
        return bool(self._high)

    @property
    def usual(self) -> float:
        """The median of calm losses; NaN before there are any."""
        return median(self._calm) if self._calm else math.nan

    def see(self, loss: float) -> bool:
        """Whether this loss makes a spike of the ones before it."""
        if self._too_high(loss):
            self._high.append(loss)
            return len(self._high) == self._needed
        self._take([*self._high, loss])
        return False

    def accept(self) -> None:
        """The loss is what it is now; later ones are compared with these."""
        high = self._high
        self._calm.clear()
        self._take(high)

    def forget(self) -> None:
        """The steps of the spike are undone."""
        self._high = []

    def _take(self, losses: list[float]) -> None:
        self._calm.extend(loss for loss in losses if math.isfinite(loss))
        self._high = []

    def _too_high(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if self._above == 0 or len(self._calm) < FEWEST:
            return False
        usual = self.usual
        spread = median(abs(other - usual) for other in self._calm)
        return loss > usual + self._above * max(_SIGMA * spread, _FLOOR * abs(usual))
