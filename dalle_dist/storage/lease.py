"""One process at a time may write to a run: it holds a lease, which it renews, and which ends.

Nothing depends on the clocks of two machines. Who wants a lease that another holds watches it, by
a clock of its own: a lease that stays as it is for its whole lifetime is nobody's any more. Each
change is a conditional write (`conditional.py`), so of two that want it one has it, and one that
slept too long learns at its next renewal that it was replaced. `fence` is that renewal, asked for
before anything is written that counts.

Source: Gray, Cheriton, "Leases", SOSP 1989.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from dalle_dist.errors import CheckpointError, DataError, UserError
from dalle_dist.storage.conditional import Cell, Versioned
from dalle_dist.storage.store import Conflict

LIFETIME = 60.0  # seconds
LONGEST = 3600.0  # seconds that anybody waits for the end of one, whatever is written in it
_RENEWALS = 3  # within a lifetime
_MARGIN = 1.1  # of a lifetime is waited: clocks run at almost the same speed
_LOOKS = 20  # within a lifetime, of who waits


class LeaseLost(CheckpointError):
    """Another process holds the lease now: nothing may be written any more."""


@dataclass(frozen=True)
class Record:
    """What lies there.

    holder    a random name of the process
    host, pid where it is, for people
    counter   renewals so far: no two records are the same
    seconds   lifetime
    released  whether the holder has ended in good order
    """

    holder: str
    host: str
    pid: int
    counter: int
    seconds: float
    released: bool = False

    def encoded(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def of(cls, data: bytes) -> Record:
        """What cannot be read is taken for somebody's."""
        try:
            found = cls(**json.loads(data))
            return replace(found, seconds=min(float(found.seconds), LONGEST))
        except (ValueError, TypeError):
            return cls("", "unknown host", 0, 0, LIFETIME)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """Held from now until `release`; a thread renews it.

    Args:
        cell: where it lies.
        run: what the errors call what it protects.
        say: takes one line, if others are waited for.
        seconds: lifetime.

    Raises:
        UserError: another process holds it, and renews it.
        NoConditions: the store does not keep two processes apart.
        DataError: the store does not answer.
    """

    def __init__(
        self, cell: Cell, run: str, say: Callable[[str], None], seconds: float = LIFETIME
    ) -> None:
        self._cell, self._run, self._say = cell, run, say
        self._record = Record(secrets.token_hex(8), socket.gethostname(), os.getpid(), 0, seconds)
        self._version, self._renewed = "", 0.0
        self._lost = ""  # to whom
        self._changing, self._ended = threading.Lock(), threading.Event()
        self._take()
        self._cell.require_conditions(self._next().encoded())
        threading.Thread(target=self._renew_in_time, name="lease", daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether this process knows that another has taken the lease."""
        return bool(self._lost)

    def fence(self) -> None:
        """Return when the lease was renewed just now, so that half of its lifetime is left.

        Raises:
            LeaseLost: another process has it.
            DataError: the store does not answer in time.
        """
        for _ in range(_RENEWALS):
            self._renew()
            if time.monotonic() - self._renewed < self._record.seconds / 2:
                return
        raise DataError(f"{self._run}: the store answers too slowly to renew the run's lease")

    def release(self, used: bool) -> None:
        """Let others in at once; of one that was not used nothing is left."""
        self._ended.set()
        # A store that does not answer now: the lease ends by itself.
        if self.lost or not self._changing.acquire(timeout=self._record.seconds / _RENEWALS):
            return
        with suppress(Conflict, DataError):
            if used:
                self._write(self._next(released=True), self._version)
            else:
                self._cell.remove(self._version)

    def _take(self) -> None:
        found = self._cell.read()
        if found is not None and not (record := Record.of(found.data)).released:
            found = self._watched(found, record)
        try:
            self._write(self._record, None if found is None else found.version)
        except Conflict:
            now = self._cell.read()
            raise self._refused(None if now is None else Record.of(now.data)) from None

    def _watched(self, found: Versioned, record: Record) -> Versioned | None:
        """What is there when the lease has ended; while it is watched, nobody renews it."""
        seconds = record.seconds * _MARGIN
        self._say(f"{record} held this run last; waiting {seconds:.0f} s to see if it goes on")
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(record.seconds / _LOOKS)
            now = self._cell.read()
            if now is None or Record.of(now.data).released:
                return now
            if now.version != found.version:
                raise self._refused(Record.of(now.data))
        return found

    def _refused(self, holder: Record | None) -> UserError:
        who = "" if holder is None else f" ({holder})"
        return UserError(
            f"{self._run}: another process is training in this run{who}; end it, or choose another "
            "folder"
        )

    def _renew_in_time(self) -> None:
        pause = self._record.seconds / _RENEWALS
        while not self._ended.wait(pause) and not self.lost:
            # What the store does not answer now it may answer the next time.
            with suppress(LeaseLost, DataError):
                self._renew()

    def _renew(self) -> None:
        with self._changing:
            while not (self._lost or self._ended.is_set()):
                try:
                    self._write(self._next(), self._version)
                    break
                except Conflict:
                    self._look_who_has_it()
            if self._lost:
                raise LeaseLost(
                    f"{self._run}: another process took this run over while this one did not "
                    f"answer ({self._lost}); nothing more is written here; end one of the two"
                )

    def _look_who_has_it(self) -> None:
        present = self._cell.read()
        if present is None:
            self._lost = "its lease was deleted"
        elif (record := Record.of(present.data)).holder != self._record.holder:
            self._lost = str(record)
        else:  # ours: of a renewal whose answer was lost
            self._record, self._version = record, present.version

    def _next(self, released: bool = False) -> Record:
        return replace(self._record, counter=self._record.counter + 1, released=released)

    def _write(self, record: Record, version: str | None) -> None:
        began = time.monotonic()
        self._version = self._cell.write(record.encoded(), version)
        self._record, self._renewed = record, began
