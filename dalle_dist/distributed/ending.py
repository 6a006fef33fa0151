"""How ranks end a run that failed: one of them says why, and all leave with the same status.

Told through the store in which the ranks met, since the collectives of a group that lost a rank no
longer work.
"""

from __future__ import annotations

import re
import signal
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

FAILED, STATUS, LEAVING = "failed", "status", "leaving"
GRACE = 10.0  # seconds that a rank waits for those that have not noticed yet
# The same where one of them is known to be gone. Slurm gives a node 10 seconds to end a step; one
# that takes longer is told once more after a minute, which then ends the step of the next start.
LOST_GRACE = 4.0
_POLL = 0.02
_LOST = re.compile(
    r"gloo/transport|Connection (closed|reset) by peer|NCCL (remote process|communicator was abort)"
    r"|ncclRemoteError|Failed to (recv|send), got|Broken pipe"
)


def lost_peer(error: Exception) -> bool:
    """Whether a collective failed since the rank at its other end is gone."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


class Ending:
    """A run's last words, of which each rank has one; `store` is shared by all of its ranks."""

    def __init__(self, store: Any, world: int) -> None:
        self._store, self._world = dist.PrefixStore("ending", store), world
        self._announced = False

    def announce(self, status: int) -> bool:
        """Tell the other ranks of a failure; whether this is the first, which may print it.

        They leave with the status of the first.
        """
        self._announced = True
        try:
            self._store.compare_set(STATUS, "", str(status))
            return bool(self._store.add(FAILED, 1) == 1)
        except RuntimeError:  # the rank that keeps the store is gone, and has not told a reason
            return True

    def told_elsewhere(self) -> int:
        """The status to leave with if another rank has announced a failure; 0 if none has.

        Its failure is then the cause of ours.
        """
        if self._announced:
            return 0
        try:
            return int(self._store.get(STATUS)) if self._store.add(FAILED, 0) > 0 else 0
        except RuntimeError:
            return 0

    def wait_for_all(self, lost: bool = False) -> None:
        """Return when every rank has come here, or after GRACE seconds; LOST_GRACE if one is lost.

        A launcher kills the others as soon as one rank has left, so they must leave together. From
        here on this rank ends by itself, and does not heed that.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        deadline = time.monotonic() + (LOST_GRACE if lost else GRACE)
        with suppress(RuntimeError):
            here = self._store.add(LEAVING, 1)
            while here < self._world and time.monotonic() < deadline:
                time.sleep(_POLL)
                here = self._store.add(LEAVING, 0)
            if here >= self._world:
                # The rank that keeps the store must outlive the others' last question.
                time.sleep(10 * _POLL)
