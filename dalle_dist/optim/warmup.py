"""The warm-up of the learning rate, of all stages."""

from __future__ import annotations


def warmup_factor(step: int, steps: int) -> float:
    """Factor on the learning rate of `step`, counted from 1: linear up to 1 at step `steps`.

    0 steps are no warm-up.
    """
    return min(1.0, step / steps) if steps else 1.0
