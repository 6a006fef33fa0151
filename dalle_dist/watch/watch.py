"""What a training loop tells of itself, and what comes of it: watchdog, heartbeat, slow ranks."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from dalle_dist import storage
from dalle_dist.config import WatchConfig
from dalle_dist.distributed import process_group
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.watch.heartbeat import Heartbeat, record_hang
from dalle_dist.watch.own_time import OwnTime
from dalle_dist.watch.slow_ranks import SlowRanks
from dalle_dist.watch.watchdog import Watchdog


class RunFolder(Protocol):
    """What is asked of a run: its path, its local folder, whether this rank is the one to write."""

    path: str
    folder: Path
    main: bool

    def fence(self) -> None: ...

    def say(self, line: str) -> None: ...


class Watch:
    """Of one rank, from when it is entered until it is left; to make one is a collective call.

    Args:
        steps: of the whole run.
        alone: whether a rank waits for no other in a forward pass.

    own  takes the time of what the rank does by itself
    """

    def __init__(
        self, settings: WatchConfig, steps: int, ranks: Ranks, run: RunFolder, alone: bool
    ) -> None:
        self._run, self._steps, self._ranks = run, steps, ranks
        self.own = OwnTime(ranks.device, alone)
        hosts = ranks.gather(socket.gethostname())
        self._watchdog = Watchdog(
            settings,
            ranks.rank,
            hosts,
            process_group.board("watch"),
            self._record,
            ranks.device.type == "cuda",
        )
        self._slow_ranks = SlowRanks(hosts, settings.slow_rank)
        self._heartbeat = Heartbeat(run.path, steps, ranks.world, self._doing, run.fence)

    def opened(self) -> None:
        """The run's folder is there from now on."""
        if self._run.main:
            self._heartbeat.start()

    def now(self, what: str, step: int) -> None:
        """The rank begins something, "step" or other, when `step` steps are finished."""
        self._watchdog.now(what, step)

    def compared(self, step_seconds: float) -> dict[str, float]:
        """The slowest rank since the last call, for the log; a collective call.

        Rank 0 says so where it holds up the others; `step_seconds`: of a whole step.

        slowest_rank   whose own work (`own_time.py`) takes longest, over the last lines
        slowest_ratio  its time to that of the median rank
        """
        if self._ranks.world == 1:
            return {}
        slowest = self._slow_ranks.add(self._ranks.each(self.own.take()))
        line = self._slow_ranks.line(slowest, step_seconds)
        if line:
            self._run.say(line)
        return {"slowest_rank": float(slowest.rank), "slowest_ratio": slowest.ratio}

    def logged(self, numbers: dict[str, Any]) -> None:
        """The numbers of a line of the log."""
        self._heartbeat.logged(numbers)

    def saved(self, step: int) -> None:
        self._heartbeat.saved(step)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._watchdog.close(failed=error is not None)
        if error is not None and isinstance(error, Exception):
            self._heartbeat.close("failed", " ".join(f"{kind.__name__}: {error}".split()))  # type: ignore[union-attr]
        elif error is not None or self._watchdog.doing.step < self._steps:
            self._heartbeat.close("stopped")
        else:
            self._heartbeat.close("complete")

    def _doing(self) -> tuple[str, int]:
        doing = self._watchdog.doing
        return doing.what, doing.step

    def _record(self, message: str) -> None:
        """A hang, where it can be read afterwards."""
        name = time.strftime("hang-%Y%m%d-%H%M%S.txt", time.gmtime())
        if (self._run.folder / "config.yaml").exists():
            storage.write_bytes(str(self._run.folder / "watch" / name), f"{message}\n".encode())
        if self._run.main:
            self._heartbeat.close("failed", message)
        else:
            record_hang(self._run.path, self._watchdog.doing.step, message)
