"""Work shared out among processes of this machine, none of which outlives this one."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

from dalle_dist.data.shard_job import Job, Record, Unit
from dalle_dist.errors import DataError

T = TypeVar("T")


def make_units(job: Job, units: Sequence[Unit], processes: int) -> Iterator[Record]:
    """The records of the units as they are finished, in any order.

    Raises:
        DataError: what a unit raises, or a process was killed. Finished units stay.
    """
    killed = (
        f"{job.folder}: {KILLED}; finished shards are kept: give the same command, with {FEWER}"
    )
    return shared_out(lambda number: job.make(units[number]), len(units), processes, killed)


KILLED = "a process was killed from outside, mostly for want of memory"
FEWER = "fewer --processes"


def shared_out(call: Callable[[int], T], count: int, processes: int, killed: str) -> Iterator[T]:
    """The results of `call` for 0 ... count - 1 as they are finished, in any order.

    Raises:
        DataError: what a call raises; `killed` when a process was.
    """
    processes = min(processes, count)
    if processes <= 1:
        yield from map(call, range(count))
        return
    # Forked: loading the libraries anew would take each process seconds. No thread is running yet.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _start, (call,)) as pool:
        waiting = [pool.submit(_made, number) for number in range(count)]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BrokenProcessPool:
            raise DataError(killed) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


_call: Callable[[int], Any]  # of a worker


def _start(call: Callable[[int], Any]) -> None:
    """Ctrl-C is the parent's to answer; when that is killed, this process ends too."""
    global _call
    _call = call
    gc.freeze()  # the plan may be large, and is not looked through for garbage again and again
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _made(number: int) -> Any:
    return _call(number)


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
