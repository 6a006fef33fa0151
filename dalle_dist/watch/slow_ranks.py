"""Which rank holds up the others."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

LINES = 5  # of the log, over which the median of each rank is taken
AGAIN = 100  # lines after which the same rank is named again
SHARE = 0.05  # of a step that a rank must lose to be worth a line
LEAST = 0.02  # seconds of each step that it must lose: the scheduler of a busy machine takes some


@dataclass(frozen=True)
class Slowest:
    """The rank whose own work takes longest; its seconds and those of the median rank, a step."""

    rank: int
    seconds: float
    median: float

    @property
    def ratio(self) -> float:
        return self.seconds / max(self.median, 1e-9)


class SlowRanks:
    """Compares ranks by the last lines of the log.

    Args:
        hosts: of all ranks.
        ratio: from which on a rank is named.
    """

    def __init__(self, hosts: Sequence[str], ratio: float) -> None:
        self._hosts, self._ratio = hosts, ratio
        self._lines: deque[Sequence[float]] = deque(maxlen=LINES)
        self._named: tuple[int, int] | None = None  # rank, and at which line
        self._count = 0

    def add(self, seconds: Sequence[float]) -> Slowest:
        """Take a line's seconds of own work in a step, of all ranks."""
        self._lines.append(seconds)
        self._count += 1
        medians = [statistics.median(of_rank) for of_rank in zip(*self._lines, strict=True)]
        rank = max(range(len(medians)), key=medians.__getitem__)
        return Slowest(rank, medians[rank], statistics.median_low(medians))

    def line(self, slowest: Slowest, step_seconds: float) -> str:
        """What there is to say of it, if there is; `step_seconds`: of a whole step."""
        lost = slowest.seconds - slowest.median
        worth_a_line = lost >= max(SHARE * step_seconds, LEAST)
        if len(self._lines) < LINES or slowest.ratio < self._ratio or not worth_a_line:
            return ""
        if self._named and self._named[0] == slowest.rank and self._count < self._named[1] + AGAIN:
            return ""
        self._named = slowest.rank, self._count
        return (
            f"rank {slowest.rank} (host {self._hosts[slowest.rank]}) takes {slowest.ratio:.2g} "
            f"times the median rank's time for samples and forward passes "
            f"({slowest.seconds:.2g} s against {slowest.median:.2g} s a step)"
        )
