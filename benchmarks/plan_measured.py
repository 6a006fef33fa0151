"""What a plan is compared with: bytes of tensors alive, bytes sent, and seconds, of real ranks."""

from __future__ import annotations

import contextlib
import gc
import io
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dalle_dist.checkpoint.manifest import Manifest
from dalle_dist.checkpoint.save import Saver
from dalle_dist.config import Config
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.deepspeed.build import build_engine
from dalle_dist.engine.deepspeed.engine import DeepSpeedEngine
from dalle_dist.gradients.piece import Piece, name_and_start
from dalle_dist.optim.ema import EMA
from dalle_dist.transformer.loss import weighted
from dalle_dist.transformer.loss_model import LossTransformer

# What each of N ranks sends of n bytes by a ring is n (N - 1) / N times this.
_PASSES = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "alltoall_base_": 1}


class Tracker(TorchDispatchMode):
    """Bytes of the storages that torch's operations have made and that are alive, and bytes sent.

    sent  by the name of the process group
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sent: dict[str, float] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._see(tensor.untyped_storage())
        space, _, name = func.name().partition("::")
        if space == "c10d":
            self._send(name, args)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or not size:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _send(self, name: str, args: Any) -> None:
        if name not in _PASSES:
            return
        tensors = [t for t in tree_iter(args) if isinstance(t, Tensor)]
        (group,) = (
            dist.ProcessGroup.unbox(a)
            for a in args
            if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
        )
        payload = max(t.numel() * t.element_size() for t in tensors)
        sent = _PASSES[name] * payload * (group.size() - 1) / group.size()
        self.sent[group.group_name] = self.sent.get(group.group_name, 0.0) + sent


@dataclass(frozen=True)
class Seen:
    """Of one rank, in its last step. Bytes and seconds.

    held      between two steps
    peak      of tensors in a step
    between   sent to other nodes, where they are averaged apart from ZeRO
    sent      all that was sent
    seconds   of the quickest steps, of a run that nothing was counted of
    """

    held: int
    peak: int
    between: float
    sent: float
    seconds: float


def watch(
    ranks: Ranks, config: Config, steps: int = 3, timed: int = 0, folder: Path | None = None
) -> Seen:
    """Train on random tokens for a few steps, and save what a checkpoint keeps into `folder`."""
    with contextlib.redirect_stdout(io.StringIO()):
        tracker = Tracker()
        with tracker:
            engine = build_engine(
                LossTransformer(config), config.train, ranks, parallel=config.parallel
            )
            average = EMA(0.9)
            average.update(engine.weights())
            for _ in range(steps):
                tracker.sent.clear()
                tracker.peak = tracker.now
                _step(engine, config)
            gc.collect()
        if folder is not None:
            _save(folder, ranks, engine, average)
        seconds = [_timed(engine, config, ranks) for _ in range(timed)]
    groups = engine._groups
    between = 0.0 if groups is None else tracker.sent.get(groups.replica.group_name, 0.0)
    total = sum(tracker.sent.values())
    return Seen(tracker.now, tracker.peak, between, total, min(seconds, default=0.0))


def _save(folder: Path, ranks: Ranks, engine: DeepSpeedEngine, average: EMA) -> None:
    """The tensors of `train/state.py`, by the code that writes checkpoints."""
    _, transforms = engine.transform_state()
    averages = [Piece(*name_and_start(key), v) for key, v in average.state([]).items()]
    kinds = {**engine.state(), "average": averages, **transforms}
    saver = Saver(str(folder), ranks, folder / "scratch", keep=1)
    layout, training = {"ranks": ranks.world}, {"shapes": engine.shapes}
    saver.save(Manifest(1, layout, {}, training, {}), kinds)
    saver.wait()


def _timed(engine: DeepSpeedEngine, config: Config, ranks: Ranks) -> float:
    ranks.barrier()
    start = time.perf_counter()
    _step(engine, config)
    return time.perf_counter() - start


def _step(engine: DeepSpeedEngine, config: Config) -> None:
    shape, train = config.transformer, config.train
    samples = train.micro_batch
    size = (samples, shape.text_tokens)
    for _ in range(engine.accumulation):
        text_BT = torch.randint(2, config.tokenizer.vocab_size, size)
        codes_BN = torch.randint(0, shape.codebook_size, (samples, shape.image_tokens))
        text, _, image, _ = engine(text_BT, codes_BN)
        # So small that fp16 does not overflow at its first scales: a skipped step sends nothing.
        images = 1000 * train.batch_size * shape.image_tokens
        engine.backward(weighted(text / images, image / images, train.text_loss))
    engine.step(1e-4)
