"""The one policy of trying again: full-jitter exponential back-off, of what can pass.

Source: Brooker, "Exponential backoff and jitter", AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from dalle_dist.errors import DataError
from dalle_dist.storage.settings import SETTINGS

T = TypeVar("T")

_counts: Counter[str] = Counter()
_counting = threading.Lock()
# A process forked while another thread counts must not inherit a lock that nobody opens.
os.register_at_fork(
    before=_counting.acquire, after_in_parent=_counting.release, after_in_child=_counting.release
)
# Neither the seed of a training run nor one that forked processes would share.
_dice = random.SystemRandom()


class PassingTrouble(Exception):
    """What another attempt may not meet again; `kind` is how it is counted, `line` says it."""

    def __init__(self, kind: str, line: str) -> None:
        super().__init__(line)
        self.kind, self.line = kind, line


class ObjectChanged(PassingTrouble):
    """The version that is being read is gone: no part of it can be had by trying again."""

    def __init__(self, path: str) -> None:
        super().__init__("changed", f"{path}: changes while it is read")


def call(attempt: Callable[[], T], beyond: tuple[type[PassingTrouble], ...] = ()) -> T:
    """What `attempt` returns, which is called again after each PassingTrouble.

    Args:
        beyond: trouble that is raised at once, for a caller who begins further up.

    Raises:
        DataError: the trouble did not pass in `SETTINGS.attempts` attempts.
    """
    number = 0
    while True:
        try:
            return attempt()
        except beyond:
            raise
        except PassingTrouble as trouble:
            number += 1
            if number >= SETTINGS.attempts:
                raise DataError(f"{trouble.line} (after {number} attempts)") from None
            with _counting:
                _counts[trouble.kind] += 1
            time.sleep(_dice.uniform(0, min(SETTINGS.cap, SETTINGS.base * 2 ** (number - 1))))


def retries() -> Counter[str]:
    """How often this process tried again so far, by kind of trouble."""
    with _counting:
        return Counter(_counts)
