"""How the ranks of an examination hear of one another: through the store where they met.

Not by collectives: those are among what is examined, and they wait half an hour for a rank that
hangs. Here such a rank is named, and the others go on without it.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dalle_dist.distributed import process_group
from dalle_dist.distributed.board import Board
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import UserError

PATIENCE = 120.0  # seconds; Triton compiles for some of them
HANGS = 60.0  # seconds after which a file system or a collective hangs
SILENT = "has not answered before"
LAST_WORD = 10.0  # seconds that rank 0 stays for the others to read the last answers
_SHORTEST, _LONGEST = 0.002, 0.1  # pauses between two looks, in seconds


@dataclass(frozen=True)
class Answer:
    """What one rank found, or in one line why it found nothing."""

    rank: int
    host: str
    value: Any = None
    error: str = ""


class Meeting:
    """Rounds in which every rank answers; all ranks call the same methods in the same order.

    Args:
        topic: under which the ranks' messages lie; another one for each meeting of a process.
        patience: seconds after which a rank that has not answered counts as lost.
    """

    def __init__(self, ranks: Ranks, topic: str = "doctor", patience: float = PATIENCE) -> None:
        self.ranks, self.patience = ranks, patience
        self.board: Board = process_group.board(topic)
        self.lost: set[int] = set()
        self._path = [0]  # number of the round, and of those inside it
        self.hosts = [""] * ranks.world
        self.opening = self.everywhere(socket.gethostname)
        self.hosts = [answer.value or "unknown host" for answer in self.opening]

    def everywhere(self, action: Callable[[], Any], within: float = 0) -> list[Answer]:
        """What `action` returns on every rank (of JSON), in rank order, on every rank.

        What it raises is that rank's answer. An action may hold rounds of its own.

        Args:
            within: seconds after which a rank leaves the action where it hangs and says so; 0 = no
                limit. Such an action holds no rounds.

        Raises:
            UserError: rank 0 does not answer.
        """
        self._path[-1] += 1
        name = "round-" + ".".join(map(str, self._path))
        self._path.append(0)
        value, error = self._attempt_within(action, within) if within else attempt(action)
        self._path.pop()
        try:
            found = self._exchanged(name, value, error)
        except RuntimeError as broken:  # the rank that keeps the store is gone
            raise UserError(f"rank 0 on {self.hosts[0]} has gone ({broken})") from None
        self.lost = {rank for rank, (_, _, lost) in enumerate(found) if lost}
        return [
            Answer(rank, self.hosts[rank], value, error)
            for rank, (value, error, _) in enumerate(found)
        ]

    def on_main(self, action: Callable[[], Any], within: float = 0) -> Answer:
        """What `action` returns on rank 0, on every rank."""
        return self.on([0], action, within)[0]

    def on(
        self, chosen: Sequence[int], action: Callable[[], Any], within: float = 0
    ) -> list[Answer]:
        """`everywhere`, but ranks that are not chosen do nothing, and their value is None."""
        return self.everywhere(action if self.ranks.rank in chosen else lambda: None, within)

    def appears(self, key: str, seconds: float) -> bool:
        """Whether somebody posts `key` within that time."""
        deadline, pause = time.monotonic() + seconds, _SHORTEST
        while not self.board.posted(key):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST)
        return True

    def close(self) -> None:
        """The last call: rank 0, which may keep the store, leaves after those that are not lost."""
        if self.ranks.rank:
            self.board.post(f"left/{self.ranks.rank}", True)
            return
        deadline = time.monotonic() + LAST_WORD
        for rank in set(range(1, self.ranks.world)) - self.lost:
            self.appears(f"left/{rank}", deadline - time.monotonic())

    @property
    def leaders(self) -> list[int]:
        """The lowest rank of each host that answers."""
        firsts: dict[str, int] = {}
        for rank, host in enumerate(self.hosts):
            if rank not in self.lost:
                firsts.setdefault(host, rank)
        return list(firsts.values())

    def named(self, ranks: Iterable[int]) -> str:
        """Ranks in words, with their hosts: `n1 (ranks 0, 1), n2 (rank 9)`, shortened."""
        ranks = sorted(ranks)
        if len(ranks) == self.ranks.world > 1:
            return "all ranks"
        by_host: dict[str, list[int]] = {}
        for rank in ranks:
            by_host.setdefault(self.hosts[rank], []).append(rank)
        parts = [
            f"{host} (rank{'s' if len(mine) > 1 else ''} {_listed(mine)})"
            for host, mine in by_host.items()
        ]
        return _listed(parts)

    def _attempt_within(self, action: Callable[[], Any], seconds: float) -> tuple[Any, str]:
        """`attempt`, in a thread that is left behind where it does not end."""
        done: list[tuple[Any, str]] = []

        def work() -> None:
            if self.ranks.device.type == "cuda":  # each thread has a current device of its own
                torch.cuda.set_device(self.ranks.device)
            done.append(attempt(action))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(seconds)
        return done[0] if done else (None, f"has not ended after {seconds:g} s")

    def _exchanged(self, name: str, value: Any, error: str) -> list[tuple[Any, str, bool]]:
        """(value, error, whether the rank is lost) of every rank."""
        self.board.post(f"{name}/{self.ranks.rank}", [value, error])
        if self.ranks.rank == 0:
            found = self._collected(name)
            self.board.post(f"{name}/all", found)
            return found
        # Rank 0 is as patient with others, and may be in the middle of an action of its own.
        if not self.appears(f"{name}/all", 3 * self.patience):
            raise UserError(f"rank 0 on {self.hosts[0]} has not answered; look at its output")
        answers: list[tuple[Any, str, bool]] = self.board.read(f"{name}/all")
        return answers

    def _collected(self, name: str) -> list[tuple[Any, str, bool]]:
        deadline = time.monotonic() + self.patience
        found: list[tuple[Any, str, bool]] = []
        for rank in range(self.ranks.world):
            # One that missed a round inside this one may have answered here long ago.
            seconds = 0.0 if rank in self.lost else deadline - time.monotonic()
            if self.appears(f"{name}/{rank}", seconds):
                found.append((*self.board.read(f"{name}/{rank}"), False))
            elif rank in self.lost:
                found.append((None, SILENT, True))
            else:
                found.append((None, f"has not answered in {self.patience:g} s", True))
        return found


def attempt(action: Callable[[], Any]) -> tuple[Any, str]:
    """What `action` returns, and an empty line; or None, and in one line what it raised."""
    try:
        return action(), ""
    except UserError as error:
        return None, " ".join(str(error).split()) or "UserError"
    except Exception as error:
        return None, " ".join(f"{type(error).__name__}: {error}".split())


def _listed(words: Sequence[Any], most: int = 8) -> str:
    shown = ", ".join(map(str, words[:most]))
    return shown + (f", ... {len(words)} in all" if len(words) > most else "")
