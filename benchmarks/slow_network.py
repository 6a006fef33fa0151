"""Two network namespaces with a link of limited rate between them: two nodes, as TCP sees it."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from types import TracebackType

INTERFACE = "slow0"  # its name in both namespaces
SENT_BYTES = Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes")
_ADDRESSES = ("10.77.0.1", "10.77.0.2")
_PORT = 29500  # nobody else listens in a new namespace
_numbers = itertools.count()


def missing() -> str | None:
    """Why there can be no such link here, or None."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "the programs ip and tc are missing (Debian: apt-get install iproute2)"
    try:
        with SlowNetwork(1000):
            return None
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


class SlowNetwork:
    """Context manager: the namespaces, and nothing of them afterwards.

    Both directions are limited apart, as in a full-duplex Ethernet; None limits neither.

    Raises:
        subprocess.CalledProcessError: the kernel refuses something.
    """

    def __init__(self, megabits: int | None) -> None:
        self._megabits = megabits
        stem = f"slow{os.getpid()}n{next(_numbers)}"
        self.nodes = (f"{stem}a", f"{stem}b")

    def __enter__(self) -> SlowNetwork:
        first, second = self.nodes
        try:
            for node in self.nodes:
                _run("ip", "netns", "add", node)
            _run(
                *("ip", "link", "add", INTERFACE, "netns", first, "type", "veth"),
                *("peer", "name", INTERFACE, "netns", second),
            )
            for node, address in zip(self.nodes, _ADDRESSES, strict=True):
                self._set_up(node, address)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._remove()

    def run(
        self, command: Sequence[str], per_node: int, seconds: float, stop: Event | None = None
    ) -> None:
        """`command` as a rank `per_node` times in each namespace, until all have ended.

        Raises:
            RuntimeError: a rank fails, they take longer than `seconds`, or `stop` is set from
                another thread; all are dead by then.
        """
        world = 2 * per_node
        ranks = [self._start(command, rank, world) for rank in range(world)]
        deadline = time.monotonic() + seconds
        try:
            while any(rank.poll() is None for rank in ranks):
                failed = [number for number, rank in enumerate(ranks) if rank.poll()]
                if failed:
                    raise RuntimeError(f"rank {failed[0]} ended with {ranks[failed[0]].returncode}")
                if stop is not None and stop.is_set():
                    raise RuntimeError("stopped")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"not done in {seconds:g} s")
                time.sleep(0.05)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()
        failed = [number for number, rank in enumerate(ranks) if rank.returncode]
        if failed:
            raise RuntimeError(f"rank {failed[0]} ended with {ranks[failed[0]].returncode}")

    def _start(self, command: Sequence[str], rank: int, world: int) -> subprocess.Popen[bytes]:
        node, local = divmod(rank, world // 2)
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world // 2),
            "MASTER_ADDR": _ADDRESSES[0],
            "MASTER_PORT": str(_PORT),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "DS_ACCELERATOR": "cpu",
        }
        inside = ("ip", "netns", "exec", self.nodes[node], *command)
        # A session of its own, so that what a rank has started dies with it.
        return subprocess.Popen(inside, env=environment, start_new_session=True)

    def _set_up(self, node: str, address: str) -> None:
        _run("ip", "-n", node, "addr", "add", f"{address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _run("ip", "-n", node, "link", "set", interface, "up")
        if self._megabits is None:
            return
        _run(
            *("tc", "-n", node, "qdisc", "add", "dev", INTERFACE, "root", "tbf"),
            *("rate", f"{self._megabits}mbit", "burst", "256kb", "latency", "100ms"),
        )

    def _remove(self) -> None:
        """The link goes with its ends."""
        for node in self.nodes:
            subprocess.run(["ip", "netns", "del", node], capture_output=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
