"""The numbers of one AdamW step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Hyperparameters:
    """What the update depends on besides its tensors. variance_clip 0 is none; step is from 1.

    Raises:
        ValueError: naming the number that is out of its range.
    """

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float = 0.0
    variance_clip: float = 0.0

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"step: {self.step} is below 1; the first step is 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not in [0, 1)")

    @property
    def keep(self) -> float:
        return 1 - self.lr * self.weight_decay

    @property
    def size(self) -> float:
        return self.lr / (1 - self.beta1**self.step)

    @property
    def root(self) -> float:
        return 1 / math.sqrt(1 - self.beta2**self.step)
