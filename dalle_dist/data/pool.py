"""The units of a job made by processes of this machine, none of which outlives this one."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection

from dalle_dist.data.shard_job import Job, Record, Unit
from dalle_dist.errors import DataError


def make_units(job: Job, units: Sequence[Unit], processes: int) -> Iterator[Record]:
    """The records of the units as they are finished, in any order.

    Raises:
        DataError: what a unit raises, or a process was killed. Finished units stay.
    """
    processes = min(processes, len(units))
    if processes <= 1:
        yield from map(job.make, units)
        return
    # Forked: loading the libraries anew would take each process seconds. No thread is running yet.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _start, (job, units)) as pool:
        waiting = [pool.submit(_make, number) for number in range(len(units))]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BrokenProcessPool:
            raise DataError(
                f"{job.folder}: a process was killed from outside, mostly for want of memory; "
                "finished shards are kept: give the same command, with fewer --processes"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


_job: Job  # of a worker
_units: Sequence[Unit]


def _start(job: Job, units: Sequence[Unit]) -> None:
    """Ctrl-C is the parent's to answer; when that is killed, this process ends too."""
    global _job, _units
    _job, _units = job, units
    gc.freeze()  # the plan may be large, and is not looked through for garbage again and again
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _make(number: int) -> Record:
    return _job.make(_units[number])


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
