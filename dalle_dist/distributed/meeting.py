"""Where ranks meet: a store of key-value pairs that rank 0 keeps, on a port that is free."""

from __future__ import annotations

import os
import random
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dalle_dist.distributed.interfaces import address_of, interface_towards
from dalle_dist.distributed.launchers import FIRST_PORT, PORTS, LaunchInfo, ports_of
from dalle_dist.errors import ConfigError

TIMEOUT = timedelta(minutes=30)
TELL = 10.0  # seconds between two lines of a rank that waits
NAMED = 8  # of the ranks that have not come
_ANSWER = 5.0  # seconds in which a store answers
_TOKEN, _HERE, _ALL, _ADDRESS = "token", "here", "all", "address"


def meet(info: LaunchInfo, opened: Any = None) -> Any:
    """The store that all ranks of a launch see, when all of them are there.

    Args:
        opened: rank 0's, if it is open by now.

    Raises:
        ConfigError: the port is taken and was not ours to choose, or ranks did not come in time.
    """
    if info.world == 1:
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun has one already
        where = f"tcp://{info.address}:{info.port}"
        store, *_ = next(dist.rendezvous(where, info.rank, info.world, timeout=TIMEOUT))
        return store
    ports = ports_of(info, os.environ)
    if info.rank == 0:
        return _await_ranks(opened or open_store(ports), info)
    return _join(_find(info, ports), info)


def free_port() -> int:
    """A TCP port that nobody listens on at this moment, for who cannot hold one from now on.

    Below those that the kernel hands out to whoever asks for any: none of these stays free long.
    """
    first, last = FIRST_PORT, FIRST_PORT + PORTS - 1
    for port in random.SystemRandom().sample(range(first, last + 1), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise ConfigError(f"none of 100 TCP ports from {first} to {last} is free")


def open_store(ports: Sequence[int]) -> Any:
    """Rank 0's, on the first of these ports that is free; 0 is any. Raises ConfigError: none is."""
    for port in ports:
        with suppress(dist.DistNetworkError):
            return dist.TCPStore(
                "127.0.0.1", port, None, is_master=True, timeout=TIMEOUT, wait_for_workers=False
            )
    taken = " and ".join(map(str, ports)) if len(ports) < 3 else f"{ports[0]} and {len(ports)} more"
    raise ConfigError(
        f"{socket.gethostname()}: port {taken} cannot be listened on, mostly since another job "
        "does; set MASTER_PORT on all ranks, or --master_port of deepspeed"
    )


def _await_ranks(store: Any, info: LaunchInfo) -> Any:
    """Rank 0's wait for all others, which says whom it waits for."""
    store.set(_TOKEN, info.token)
    store.add(_HERE, 1)
    began = told = time.monotonic()
    while store.add(_HERE, 0) < info.world:
        time.sleep(0.02)
        now = time.monotonic()
        if now - told > TELL:
            told, missing = now, _missing(store, info.world)
            _say(f"rank 0 waits for {missing} of {info.world} ranks, on port {store.port}")
        if now - began > TIMEOUT.total_seconds():
            raise ConfigError(f"{_missing(store, info.world)} of {info.world} ranks did not come")
    store.set(_ALL, "")
    return store


def reachable(names: Sequence[str], port: int) -> str:
    """The first of a machine's names and addresses at which its port answers, or else the first."""
    for name in names:
        with suppress(OSError):
            socket.create_connection((name, port), timeout=_ANSWER).close()
            return name
    return names[0]


def choose_interface(store: Any, info: LaunchInfo) -> None:
    """Tell gloo which interface leads to rank 0, unless the user has, or all are on one machine."""
    if info.world == info.local_world or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    if not store.check([_ADDRESS]):
        return
    name = interface_towards(store.get(_ADDRESS).decode())
    if name:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _join(store: Any, info: LaunchInfo) -> Any:
    store.set(f"{_HERE}/{info.rank}", "")
    if info.rank == info.world - 1:
        # As others see it: to itself rank 0's machine may be loopback.
        store.set(_ADDRESS, address_of(info.address))
    store.add(_HERE, 1)
    with suppress(dist.DistError):
        store.wait([_ALL], TIMEOUT)
        return store
    raise ConfigError(f"rank {info.rank}: not all of {info.world} ranks came in time")


def _find(info: LaunchInfo, ports: Sequence[int]) -> Any:
    """Rank 0's store, which is that of this launch: others may listen on these ports too."""
    began = told = time.monotonic()
    while time.monotonic() - began < TIMEOUT.total_seconds():
        for port in ports:
            store = _store_at(info, port)
            if store is not None:
                return store
        if time.monotonic() - told > TELL:
            told = time.monotonic()
            if info.local_rank == 0:
                _say(f"rank {info.rank} waits for rank 0 at {info.address}:{ports[0]}")
        time.sleep(0.1)
    raise ConfigError(
        f"rank {info.rank}: rank 0 did not come to {info.address}, port {ports[0]}, in time; set "
        "MASTER_ADDR and MASTER_PORT on all ranks if it is elsewhere"
    )


def _store_at(info: LaunchInfo, port: int) -> Any:
    """Rank 0's store, or None where nobody, somebody else or nothing that answers listens."""
    with suppress(OSError):
        socket.create_connection((info.address, port), timeout=_ANSWER).close()
        found: list[Any] = []
        # The store's own handshake waits without end for a program that stays silent.
        asking = threading.Thread(target=_ask, args=(info, port, found), daemon=True)
        asking.start()
        asking.join(2 * _ANSWER)
        return found[0] if found else None
    return None


def _ask(info: LaunchInfo, port: int, found: list[Any]) -> None:
    with suppress(dist.DistError, ValueError, RuntimeError):
        store = dist.TCPStore(
            info.address, port, None, is_master=False,
            timeout=timedelta(seconds=_ANSWER), wait_for_workers=False,
        )  # fmt: skip
        if store.get(_TOKEN).decode() == info.token:
            store.set_timeout(TIMEOUT)
            found.append(store)


def _missing(store: Any, world: int) -> str:
    absent = [rank for rank in range(1, world) if not store.check([f"{_HERE}/{rank}"])]
    named = ", ".join(map(str, absent[:NAMED])) + ", ..." * (len(absent) > NAMED)
    return f"{len(absent)} ({named})"


def _say(line: str) -> None:
    print(f"dalle-dist: {line}", file=sys.stderr, flush=True)
