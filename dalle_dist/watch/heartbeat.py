"""`heartbeat.json` in the folder of a run: what it does at the moment, for people and programs.

Written by rank 0, from a thread of its own, as a whole or not at all: every LOCAL seconds into a
folder, every REMOTE seconds into a store.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dalle_dist import storage
from dalle_dist.errors import UserError

NAME = "heartbeat.json"
LOCAL, REMOTE = 10.0, 60.0  # seconds between two of them
SAID = ("loss", "images_per_s", "tokens_per_s", "mfu", "seconds_left", "slowest_rank",
        "slowest_ratio")  # fmt: skip


class Heartbeat:
    """Of one process in a run; nothing is written before `start`.

    Args:
        run: path of the run, local or remote.
        steps: of the whole run.
        world: number of ranks.
        doing: what the run does, and how many steps are finished.
        fence: raises UserError unless this process alone may write to the run.
    """

    def __init__(
        self,
        run: str,
        steps: int,
        world: int,
        doing: Callable[[], tuple[str, int]],
        fence: Callable[[], None],
    ) -> None:
        self._path, self._doing, self._fence = storage.join(run, NAME), doing, fence
        self._every = REMOTE if storage.is_remote(run) else LOCAL
        self._facts: dict[str, Any] = {
            "steps": steps,
            "ranks": world,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "began": round(time.time(), 3),
            "every": self._every,
        }
        self._numbers: dict[str, Any] = {}
        self._closed, self._one_at_a_time = threading.Event(), threading.Lock()
        self._started = False

    def start(self) -> None:
        """Begin to write; the processes that were in this run before are counted."""
        before = read(self._path)
        self._facts["restarts"] = before["restarts"] + 1 if before else 0
        self._started = True
        threading.Thread(target=self._go_on, name="heartbeat", daemon=True).start()

    def logged(self, numbers: dict[str, Any]) -> None:
        self._numbers = {name: numbers[name] for name in SAID if name in numbers}

    def saved(self, step: int) -> None:
        self._facts["saved"] = {"step": step, "time": round(time.time(), 3)}

    def close(self, state: str, error: str = "") -> None:
        """Write the last one: stopped, complete or failed, and then why."""
        self._closed.set()
        if self._started:
            self._write(state, error)

    def _go_on(self) -> None:
        self._write()
        while not self._closed.wait(self._every):
            self._write()

    def _write(self, state: str = "", error: str = "") -> None:
        with self._one_at_a_time:
            if self._closed.is_set() and not state:
                return  # the last one is written, or waits for its turn
            doing, step = self._doing()
            going = "saving" if doing == "saving" else "training"
            line = {"state": state or going, "doing": doing, "step": step, "time": time.time()}
            known = line | self._numbers | self._facts | ({"error": error} if error else {})
            # A disk or a store in trouble: the run itself finds out where it matters.
            with suppress(UserError, OSError):
                self._fence()
                storage.write_bytes(self._path, json.dumps(known, indent=1).encode())


def read(path: str) -> dict[str, Any]:
    """A heartbeat; empty where none is, or where it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(storage.read_bytes(path))
    except (UserError, OSError, ValueError):
        return {}
    return found


def record_hang(run: str, step: int, message: str) -> None:
    """Have the heartbeat of a run say that it hung, in place of rank 0, which does not answer.

    Raises UserError: it cannot be written.
    """
    path = storage.join(run, NAME)
    found = read(path)
    if found:
        found |= {"state": "failed", "step": step, "error": message, "time": time.time()}
        storage.write_bytes(path, json.dumps(found, indent=1).encode())
