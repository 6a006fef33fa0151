"""What a run is asked while it trains: to stop, or to save; agreed on by all ranks in each step.

A signal to any rank asks it to stop. So does a file `stop` in the run's folder, which stays there
until somebody removes it; a file `save` asks for a checkpoint, and goes.
"""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from typing import Any

from dalle_dist import storage
from dalle_dist.errors import DataError, UserError
from dalle_dist.stages import SAVE, STOP

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LOOK = 5.0  # seconds between two looks for the files of a local run
LOOK_FAR = 30.0  # of a remote one: each is two requests


class StopRequest:
    """Remembers SIGTERM, SIGINT and SIGUSR1; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


class Switches:
    """The files `stop` and `save` of a run, which a thread of rank 0 looks for.

    Args:
        run: the run's path, local or remote.
        main: whether this is rank 0.
        every: seconds between two looks; None: LOOK or LOOK_FAR.
    """

    def __init__(self, run: str, main: bool, every: float | None = None) -> None:
        self.stop, self._save = False, False
        self._run = run
        self._every = every or (LOOK_FAR if storage.is_remote(run) else LOOK)
        self._closed = threading.Event()
        if main:
            threading.Thread(target=self._watch, name="switches", daemon=True).start()

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._every):
            with suppress(DataError):  # a store that does not answer now is asked again
                self._look()

    def _look(self) -> None:
        self.stop |= storage.exists(storage.join(self._run, STOP))
        path = storage.join(self._run, SAVE)
        if storage.exists(path):
            storage.remove(path)
            self._save = True


def refuse_stopped(run: str) -> None:
    """Raise UserError where the file `stop` of an earlier start still lies in the run's folder."""
    path = storage.join(run, STOP)
    if storage.exists(path):
        raise UserError(f"{path}: this file stops the run; remove it to go on")
