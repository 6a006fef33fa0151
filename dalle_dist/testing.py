"""Help for tests: real processes as ranks."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dalle_dist.distributed import process_group


def run_distributed(
    fn: Callable[..., Any], world: int, *args: Any, timeout: float = 120, threads: int = 1
) -> list[Any]:
    """Call `fn(ranks, *args)` in `world` processes over gloo; return the results in rank order.

    `fn` must be a module-level function; `args` and results are pickled. Fails with the tracebacks
    of all ranks when one raises, dies, or the time (seconds) runs out.
    """
    context = fork_server()
    # Kept here, as torchrun does: a port that was only looked up could be taken before it is used.
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    ends, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        environment = _environment(rank, world, store.port, threads)
        process = context.Process(
            target=_rank_main, args=(theirs, environment, threads, fn, args), daemon=False
        )
        process.start()
        theirs.close()
        ends.append(ours)
        processes.append(process)
    try:
        outcomes = _collect(ends, timeout)
    finally:
        _stop(processes)
    failed = {rank: text for rank, (ok, text) in outcomes.items() if not ok}
    if failed:
        pytest.fail("\n".join(f"rank {r}:\n{text}" for r, text in failed.items()), pytrace=False)
    return [outcomes[rank][1] for rank in range(world)]


def fork_server() -> ForkServerContext:
    """A server that has imported the slow packages once forks each rank in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    # The compiler comes with the first optimizer that is made, and takes longer than all the rest.
    compiler = ["torch._dynamo", "torch._inductor.compile_fx"]
    context.set_forkserver_preload(["torch", *compiler, "deepspeed", "dalle_dist.testing"])
    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):
        forkserver.ensure_running()
    return context


def _environment(rank: int, world: int, port: int, threads: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": "cpu",
    }


def _rank_main(
    end: Connection,
    environment: dict[str, str],
    threads: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(threads)
    try:
        result = fn(process_group.init(), *args)
        end.send((True, result))
    except BaseException:
        end.send((False, traceback.format_exc()))
        sys.stdout.flush()
        # Peers may wait for this rank in a collective: leaving at once breaks their connection.
        os._exit(1)
    process_group.shutdown()


def _collect(ends: list[Connection], timeout: float) -> dict[int, tuple[bool, Any]]:
    outcomes: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + timeout
    while len(outcomes) < len(ends):
        pending = [rank for rank in range(len(ends)) if rank not in outcomes]
        ready = wait([ends[rank] for rank in pending], max(0.0, deadline - time.monotonic()))
        if not ready:
            outcomes.update(dict.fromkeys(pending, (False, f"no answer in {timeout:g} s")))
        for rank in pending:
            if ends[rank] in ready:
                outcomes[rank] = _receive(ends[rank])
                if not outcomes[rank][0]:
                    deadline = min(deadline, time.monotonic() + 10)
    return outcomes


def _receive(end: Connection) -> tuple[bool, Any]:
    try:
        outcome: tuple[bool, Any] = end.recv()
        return outcome
    except EOFError:
        return False, "the process died without a word"


def _stop(processes: list[Any]) -> None:
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()
