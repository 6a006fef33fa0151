"""Saving and loading a training state by two ranks: ours, DeepSpeed's own and torch's DCP.

    torchrun --nproc-per-node 2 -m benchmarks.checkpoint

The state is that of a transformer under ZeRO-2 in fp32: weights, two moments, and of ours the
moving average too. `pause` is for how long training stands still, `whole` until the bytes are on
disk (DeepSpeed flushes none). Loads are timed from the page cache. What conversions cost is
measured by `checkpoint_convert.py`.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from benchmarks import common
from benchmarks.common import Measured
from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.save import Saver
from dalle_dist.config import Config, from_dict, to_dict
from dalle_dist.distributed import process_group
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.deepspeed.build import build_engine
from dalle_dist.optim.ema import EMA
from dalle_dist.optim.plateau_schedule import PlateauSchedule
from dalle_dist.train.data import Progress
from dalle_dist.train.state import Identity, TrainingState
from dalle_dist.transformer.loss_model import LossTransformer

OURS, DEEPSPEED, DCP = "ours", "DeepSpeed save_checkpoint", "DCP async_save"


def main() -> None:
    options = common.arguments(__doc__, rounds=5)
    ranks = process_group.init()
    torch.set_num_threads(options.threads if ranks.world == 1 else 1)
    config = state_config(options.smoke)
    folder = Path(ranks.broadcast(tempfile.mkdtemp(prefix="checkpoints-")))
    bench = Bench(config, ranks, folder)
    try:
        bench.check()
        figures = list(bench.figures(options.rounds))
    finally:
        ranks.barrier()
        if ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    if ranks.rank == 0:
        common.report("checkpoint", config, figures, options)
    process_group.shutdown()


def state_config(smoke: bool) -> Config:
    """75 million parameters; with --smoke 0.1."""
    tree = to_dict(common.benchmark_config(smoke))
    if not smoke:
        tree["name"] = "d1024-l4"
        tree["transformer"] |= {"width": 1024, "heads": 16}
    tree["train"] |= {"zero_stage": 2, "batch_size": 2, "micro_batch": 1, "ema_every": 1}
    return from_dict(tree)


class Bench:
    """The three ways to save and load one state, on one rank of several."""

    def __init__(self, config: Config, ranks: Ranks, folder: Path) -> None:
        self.ranks, self.folder = ranks, folder
        self.group = dist.new_group()  # of DCP's thread, whose collectives must not meet ours
        torch.manual_seed(0)
        self.engine = build_engine(LossTransformer(config), config.train, ranks)
        train = config.train
        self.state = TrainingState(
            Identity("transformer", config, train, train.precision),
            ranks,
            self.engine,
            EMA(train.ema),
            PlateauSchedule(train),
            Progress(0, {}, 1),
        )
        batch = common.random_batch(config, 1)
        for _ in range(self.engine.accumulation):
            self.engine.backward(self.engine(*batch)[0] / 100)
        self.engine.step(1e-4)
        self.state.ema.update(self.engine.weights())
        self.saver = Saver(str(folder / "ours"), ranks, folder / "scratch", keep=1)

    def figures(self, rounds: int) -> Iterable[Measured]:
        times: dict[tuple[str, str], list[float]] = {}
        for timed in range(rounds + 1):
            for case, save in (
                (OURS, self.save_ours),
                (DEEPSPEED, self.save_deepspeed),
                (DCP, self.save_dcp),
            ):
                pause, whole = save(timed)
                found = {(case, "pause"): pause, (case, "whole save"): whole}
                for how, load in self.loads(case):
                    found[case, f"load, {how}"] = self.clock(load)
                for key, took in found.items():
                    times.setdefault(key, []).extend([took] if timed else [])
        for (case, metric), values in times.items():
            yield Measured(case, metric, "s", values)
        for case, place in (("ours", "ours"), (DEEPSPEED, "deepspeed"), (DCP, "dcp")):
            files = [p for p in (self.folder / place).rglob("*") if p.is_file()]
            yield Measured(case, "size", "MB", [sum(p.stat().st_size for p in files) / 1e6])
        yield from self.ratios(times)

    def ratios(self, times: dict[tuple[str, str], list[float]]) -> Iterable[Measured]:
        def apart(one: tuple[str, str], other: tuple[str, str]) -> list[float]:
            return [a / b for a, b in zip(times[one], times[other], strict=True)]

        pauses = apart((OURS, "pause"), (DEEPSPEED, "pause"))
        yield Measured("ours / DeepSpeed", "pause", "", pauses)
        yield Measured("ours / DCP", "pause", "", apart((OURS, "pause"), (DCP, "pause")))
        loads = apart((OURS, "load, verified"), (OURS, "load, unverified"))
        yield Measured("verified / unverified", "load", "", loads)

    def clock(self, run: Callable[[], object]) -> float:
        """Seconds of the slowest rank."""
        gc.collect()
        self.ranks.barrier()
        return self.ranks.max([common.seconds(run)])[0]

    def save_ours(self, number: int) -> tuple[float, float]:
        self.state.step = number
        began = time.perf_counter()
        pause = self.clock(lambda: self.state.save(self.saver))
        self.saver.wait()
        return pause, self.ranks.max([time.perf_counter() - began])[0]

    def save_deepspeed(self, number: int) -> tuple[float, float]:
        folder = str(self.folder / "deepspeed")
        own = self.engine._engine
        took = self.clock(lambda: own.save_checkpoint(folder, tag="same"))
        return took, took

    def save_dcp(self, number: int) -> tuple[float, float]:
        folder = self.folder / "dcp"
        if self.ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self.ranks.barrier()
        writer = dcp.FileSystemWriter(folder)
        began, futures = time.perf_counter(), []
        pause = self.clock(
            lambda: futures.append(
                dcp.async_save(self.tensors(), storage_writer=writer, process_group=self.group)
            )
        )
        futures[0].result()
        return pause, self.ranks.max([time.perf_counter() - began])[0]

    def tensors(self) -> dict[str, Tensor]:
        """This rank's state as DCP takes it; names that no other rank has, or it would be one."""
        return {
            f"{self.ranks.rank}/{kind}/{piece.key}": piece.values
            for kind, pieces in self.engine.state().items()
            for piece in pieces
        }

    def loads(self, case: str) -> list[tuple[str, Callable[[], object]]]:
        if case == DEEPSPEED:
            folder = str(self.folder / "deepspeed")
            return [("unverified", lambda: self.engine._engine.load_checkpoint(folder, tag="same"))]
        if case == DCP:
            reader = dcp.FileSystemReader(self.folder / "dcp")
            return [("unverified", lambda: dcp.load(self.tensors(), storage_reader=reader))]
        checkpoint = store.step_folder(self.saver.folder, self.state.step)

        def verified() -> None:
            store.verify(checkpoint, self.ranks)
            self.state.load(checkpoint)

        return [
            ("unverified", lambda: self.state.load(checkpoint)),
            ("verified", verified),
        ]

    def check(self) -> None:
        """Exit unless each of ours and DeepSpeed's gives back what was saved."""
        before = self.copy()
        self.save_ours(0)
        self.save_deepspeed(0)
        for case in (OURS, DEEPSPEED):
            for how, load in self.loads(case):
                for pieces in self.engine.state().values():
                    for piece in pieces:
                        piece.values.zero_()
                load()
                same = all(torch.equal(a, b) for a, b in zip(before, self.copy(), strict=True))
                if self.ranks.any(not same):
                    raise SystemExit(f"{case}, {how}: does not give back what was saved")

    def copy(self) -> list[Tensor]:
        return [p.values.clone() for pieces in self.engine.state().values() for p in pieces]


if __name__ == "__main__":
    main()
