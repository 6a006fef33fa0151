"""What the order of a large set takes, told by processes that do nothing else, as JSON.

python -m benchmarks.data_order first INDEX     to the places of a batch amid an epoch: seconds
python -m benchmarks.data_order alone INDEX     many batches: growth of this process, bytes
python -m benchmarks.data_order workers INDEX   as many each: what loader processes take, bytes
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from multiprocessing import connection
from pathlib import Path

import torch
from torch.utils.data import Dataset

from dalle_dist.data.loader import batches
from dalle_dist.data.order import SampleOrder
from dalle_dist.data.shards import ShardIndex
from dalle_dist.data.source import SampleSource

STREAMS, SHUFFLE_SHARDS, BATCH, START, WORKERS = 64, 2, 1_024, 1_000_000, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=tuple(MEASURES))
    parser.add_argument("folder")
    parser.add_argument("--batches", type=int, default=1_000, help="to draw (%(default)s)")
    options = parser.parse_args()
    print(json.dumps(MEASURES[options.what](options.folder, options.batches)))


def first(folder: str, _batches: int) -> dict[str, float]:
    start = time.perf_counter()
    order = _order(folder)
    places = [order.at(position) for position in range(START, START + BATCH)]
    took = time.perf_counter() - start
    if len({place[1:] for place in places}) < BATCH:
        raise SystemExit("data_order: a sample comes twice in a batch")
    return {"seconds": took}


def alone(folder: str, count: int) -> dict[str, float]:
    """`peak`: while the index is read."""
    before = _status("VmRSS")
    places = _Places(folder)
    for position in range(START, START + count * BATCH):
        places[position]
    return {"bytes": _status("VmRSS") - before, "peak": _status("VmHWM") - before}


def workers(folder: str, count: int) -> dict[str, float]:
    """Of WORKERS loader processes together, beyond those that only wait."""
    idle = _idle_forks()
    stream = batches(
        _Places(folder), batch_size=BATCH, micro_batch=BATCH, rank=0, world=1, start=START,
        workers=WORKERS, collate=lambda places: torch.tensor(list(places)),
    )  # fmt: skip
    for _ in range(WORKERS * count):
        next(stream)
    children = multiprocessing.active_children()
    return {"bytes": sum(_proportional(child.pid) for child in children) - idle}


MEASURES = {"first": first, "alone": alone, "workers": workers}


def _order(folder: str) -> SampleOrder:
    return SampleOrder(0, ShardIndex.load(folder).shards.samples, STREAMS, SHUFFLE_SHARDS)


class _Places(Dataset):
    """Where samples lie; reads none of them."""

    def __init__(self, folder: str) -> None:
        self.source = SampleSource(folder, "tokens", _order(folder))

    def __getitem__(self, position: int) -> list[int]:
        return list(self.source.place(position))


def _idle_forks() -> int:
    """Bytes of WORKERS processes that only wait."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    children = [context.Process(target=_wait, args=(receiving,)) for _ in range(WORKERS)]
    for child in children:
        child.start()
    # All forked: none shares more with another than those that are not there yet.
    found = sum(_proportional(child.pid) for child in children)
    for _ in children:
        sending.send(None)
    for child in children:
        child.join()
    return found


def _wait(receiving: connection.Connection) -> None:
    receiving.recv()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1_024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _proportional(process: int | None) -> int:
    """Bytes of a process, what it shares with n others counted 1/n."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1_024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
