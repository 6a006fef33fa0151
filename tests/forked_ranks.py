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
    while not all(_file(folder, number).exists() for number in range(world)):
        time.sleep(0.01)
    return ranks


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
