"""The requests that wait, first come first served, and the one that is carried out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from dalle_dist.serve.form import Asked
from dalle_dist.serve.limits import Refusal

Event = dict[str, Any]


class Ticket:
    """A request in the line; `tell` hands an event to its client, from any thread."""

    def __init__(self, wanted: Asked, tell: Callable[[Event], None]) -> None:
        self.wanted, self.tell = wanted, tell
        self.left = False  # the client has gone, or the server is stopping


class Line:
    """Entered and left by the server's thread, served by the worker's."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: deque[Ticket] = deque()
        self._served: Ticket | None = None
        self._open = True
        self._changed = threading.Condition()

    def check_place(self) -> None:
        """Raises Refusal: all places are taken, or the server is stopping."""
        with self._changed:
            if not self._open:
                raise Refusal(503, "the server is stopping")
            if len(self._waiting) >= self._most:
                raise Refusal(503, f"{self._most} requests wait already; try again later")

    def enter(self, ticket: Ticket) -> None:
        """Raises Refusal as `check_place`."""
        with self._changed:
            self.check_place()
            self._waiting.append(ticket)
            self._tell_places()
            self._changed.notify_all()

    def leave(self, ticket: Ticket) -> None:
        """Whatever became of it; one that is carried out ends with its batch."""
        with self._changed:
            ticket.left = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._tell_places()

    def next(self) -> Ticket | None:
        """The worker has done with the last one, and waits for another; None: it may go home."""
        with self._changed:
            self._served = None
            self._changed.wait_for(lambda: self._waiting or not self._open)
            if not self._open:
                return None
            self._served = self._waiting.popleft()
            self._tell_places()
            return self._served

    def close(self) -> None:
        """Everyone is told, and sent away."""
        with self._changed:
            self._open = False
            served = [] if self._served is None else [self._served]
            for ticket in [*served, *self._waiting]:
                ticket.left = True
                ticket.tell({"error": "the server is stopping"})
            self._waiting.clear()
            self._changed.notify_all()

    def _tell_places(self) -> None:
        for place, ticket in enumerate(self._waiting):
            before = place + (self._served is not None)
            ticket.tell({"before": before})
