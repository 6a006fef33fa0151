"""Ranks of a program that may be killed, forked from a process that has imported torch.

A launcher would take ten seconds of a core for each of them, at each start.
"""

import os
import time

from dalle_dist.distributed.meeting import free_port
from dalle_dist.testing import fork_server


def start(world, main, folder, *args):
    """Processes that do `main(rank, folder, *args)`; what each says is in `said(folder, rank)`.

    `main` is a function of a module, whose imports are done by then. Returns when each begins.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, context = free_port(), fork_server()
    ranks = [
        context.Process(target=_begin, args=(rank, world, port, main, folder, args))
        for rank in range(world)
    ]
    for number, rank in enumerate(ranks):
        _file(folder, number).unlink(missing_ok=True)
        rank.start()
    for number, rank in enumerate(ranks):
        while not _file(folder, number).exists():
            assert rank.is_alive(), f"rank {number} ended before it began: {rank.exitcode}"
            time.sleep(0.01)
    return ranks


def exit_codes(ranks, seconds=120):
    """Of all ranks in the end; None of those that had to be killed for they took longer."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def said(folder, rank=0):
    return _file(folder, rank).read_text()


def _begin(rank, world, port, main, folder, args):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    # Not there before the imports of main's module are done: one can swallow an interrupt.
    file = os.open(_file(folder, rank), os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    main(rank, folder, *args)


def _file(folder, rank):
    return folder / f"said-{rank}"
