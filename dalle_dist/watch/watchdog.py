"""A thread in each rank that ends all of them when their main threads make no progress any more.

In the normal case it only counts seconds. A rank that has been idle for half of `hang_after` begins
to ask the store where ranks met for an alarm; the first whose time is over raises it. Then all say
where they are, one of them says so to the user, and all leave with status HUNG. Whoever cannot talk
to the others leaves by itself.

Seconds are counted as the thread wakes, so that a process which was stopped and goes on (a
suspended job) has not been idle meanwhile.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dalle_dist.config import WatchConfig
from dalle_dist.distributed.board import Board
from dalle_dist.distributed.process_group import abandon
from dalle_dist.errors import HUNG
from dalle_dist.watch.place import Place, place_of
from dalle_dist.watch.verdict import Stuck, verdict

POLL = 1.0  # seconds between two looks at the clock
ANSWER = 5.0  # that ranks have to say where they are
LEAVE = 1.0  # that the one who speaks outlives the others: it may keep the store
GRACE = 20.0  # after which a rank that hears of no verdict leaves
ALARM, VERDICT = "alarm", "verdict"


@dataclass(frozen=True, eq=False)
class Doing:
    """What a rank does: each is another one, even where all is equal."""

    what: str
    step: int  # finished
    first: bool = False

    @property
    def stuck(self) -> Stuck:
        making = self.what == "step"
        return Stuck(self.step + making, self.what)


class Watchdog:
    """Begins when it is made and ends by `close`.

    Args:
        rank: this one's number; hosts: names of the computers of all ranks.
        board: on which they leave word.
        record: takes the message, on the rank that speaks; called from another thread.
        on_gpu: whether a wait for a value may be one for the GPU.
    """

    def __init__(
        self,
        settings: WatchConfig,
        rank: int,
        hosts: Sequence[str],
        board: Board,
        record: Callable[[str], None],
        on_gpu: bool = False,
    ) -> None:
        self._settings, self._rank, self._hosts = settings, rank, hosts
        self._board, self._record, self._on_gpu = board, record, on_gpu
        limits = [s for s in (settings.hang_after, settings.hang_after_others) if s]
        self._listen_after = min(limits, default=0.0) / 2
        self._poll = min(POLL, self._listen_after / 4)
        self._thread = threading.get_ident()
        self.doing, self._steps = Doing("start", 0), 0
        self._idle = 0.0  # seconds since `doing` changed
        self._closed, self._alarmed = threading.Event(), threading.Event()
        if limits:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def now(self, what: str, step: int) -> None:
        """This rank begins something: "step" or other; `step` of them are finished."""
        self._steps += what == "step"
        self.doing = Doing(what, step, first=self._steps == 1)

    def close(self, failed: bool = False) -> None:
        """Watch no longer.

        Does not return once there is an alarm: collectives that break then are no reason to end,
        but for what the alarm says.
        """
        with suppress(RuntimeError):
            if self._alarmed.is_set() or (failed and self._board.posted(ALARM)):
                time.sleep(2 * GRACE)
                abandon(HUNG)
        self._closed.set()

    def _watch(self) -> None:
        before, seen, left = time.monotonic(), self.doing, GRACE
        talker: threading.Thread | None = None
        while not self._closed.wait(self._poll):
            now = time.monotonic()
            gap, before = min(now - before, 2 * self._poll), now
            if self.doing is not seen and not self._alarmed.is_set():
                seen, self._idle = self.doing, 0.0
            self._idle += gap
            if self._idle > self._listen_after and not (talker and talker.is_alive()):
                talker = threading.Thread(target=self._talk, args=(seen,), daemon=True)
                talker.start()
            if self._overdue(seen) or self._alarmed.is_set():
                left -= gap
            if left <= 0:
                self._leave_alone(seen)

    def _overdue(self, doing: Doing) -> bool:
        usual = doing.what == "step" and not doing.first
        limit = self._settings.hang_after if usual else self._settings.hang_after_others
        return 0 < limit < self._idle

    def _talk(self, doing: Doing) -> None:
        """Await an alarm, or raise it, as long as this rank goes on with the same."""
        with suppress(RuntimeError):  # the store has gone: each rank leaves alone
            while self.doing is doing and not self._closed.is_set():
                if self._overdue(doing) or self._board.posted(ALARM):
                    self._alarmed.set()
                    self._tell(doing.stuck)
                time.sleep(self._poll)

    def _tell(self, stuck: Stuck) -> None:
        place = place_of(self._thread, self._on_gpu)
        said = [stuck.step, stuck.doing, dataclasses.astuple(place)]
        self._board.post(_key(self._rank), said)
        self._board.post(ALARM, self._rank)
        self._await(lambda: self._board.all_posted(map(_key, range(len(self._hosts)))), ANSWER)
        if self._first_that_answered():
            self._speak(self._found())
        self._await(lambda: self._board.posted(VERDICT), 2 * GRACE)
        abandon(HUNG)

    def _await(self, there: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not there() and time.monotonic() < deadline:
            time.sleep(min(0.1, self._poll))

    def _first_that_answered(self) -> bool:
        return not any(self._board.posted(_key(rank)) for rank in range(self._rank))

    def _found(self) -> dict[int, Stuck]:
        found = {}
        for rank in range(len(self._hosts)):
            if self._board.posted(_key(rank)):
                step, doing, place = self._board.read(_key(rank))
                found[rank] = Stuck(step, doing, Place(*place))
        return found

    def _speak(self, found: dict[int, Stuck]) -> None:
        message = verdict(found, dict(enumerate(self._hosts)), self._idle)
        print(f"dalle-dist: error: {message}", file=sys.stderr, flush=True)
        self._board.post(VERDICT, message)
        with suppress(Exception):  # a disk or store that is the very cause
            self._record(message)
        time.sleep(LEAVE)
        abandon(HUNG)

    def _leave_alone(self, doing: Doing) -> None:
        """Without the others; what is said must not wait for anyone either."""
        stuck = dataclasses.replace(doing.stuck, place=place_of(self._thread, self._on_gpu))
        message = verdict({self._rank: stuck}, {self._rank: self._hosts[self._rank]}, self._idle)
        text = f"dalle-dist: error: {message}; the other ranks cannot be reached\n"
        writer = threading.Thread(target=os.write, args=(2, text.encode()), daemon=True)
        writer.start()
        writer.join(1.0)
        abandon(HUNG)


def _key(rank: int) -> str:
    return f"place/{rank}"
