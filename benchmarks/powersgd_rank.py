"""One rank of one contender of powersgd_network.py: trains, and tells what each step took.

`python -m benchmarks.powersgd_rank JOB.json`, in the environment that a launcher would set. The
same loader, loss, optimizer and schedule for all; what differs is who averages the gradients, and
how.

Shape suffixes: B batch, T text positions, N image tokens.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.slow_network import SENT_BYTES
from dalle_dist.config import Config, from_dict
from dalle_dist.data.loader import batches
from dalle_dist.data.shards import ShardIndex
from dalle_dist.data.token_dataset import TokenDataset, TokenSample, collate_tokens
from dalle_dist.distributed import process_group
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.deepspeed.build import build_engine
from dalle_dist.optim.adamw import AdamW
from dalle_dist.optim.param_groups import param_groups
from dalle_dist.optim.plateau_schedule import PlateauSchedule
from dalle_dist.text_tokenizer.bpe import Tokenizer
from dalle_dist.train.data import training_order
from dalle_dist.transformer.blocks import resblock_map
from dalle_dist.transformer.layout import counted_text_targets
from dalle_dist.transformer.loss import weighted
from dalle_dist.transformer.loss_model import LossTransformer

# torch's hook wants at least two steps without compression, while DDP rebuilds its buckets.
TORCH_START = 2
SINGLE_BUCKET_MB = 1 << 14


@dataclass(frozen=True)
class Outcome:
    """Of one rank. Lists have one number per step."""

    seconds: list[float]
    cpu_seconds: list[float]  # of this process, gloo's threads among it
    sent_bytes: list[int]  # by this node's network interface, headers and all
    losses: list[float]  # of the whole batch
    weights: str  # digest of all parameters after the last step


class Trainer(Protocol):
    """What `Engine` offers, and `Replicated` below does like it."""

    def __call__(self, *inputs: Any) -> Any: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, lr: float) -> float: ...


class Replicated:
    """The model under DDP with one of torch's communication hooks, clipped and stepped as ours."""

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks, hook: str) -> None:
        train = config.train
        self._world, self._clip = ranks.world, train.clip
        # One bucket: of several, PowerSGD's hook launches Q of one and P of the next in an order
        # that differs between ranks, and gloo gives up.
        cap = SINGLE_BUCKET_MB if hook == "powerSGD" else None
        self._model = DistributedDataParallel(model, bucket_cap_mb=cap)
        if hook == "powerSGD":
            state = powerSGD_hook.PowerSGDState(
                None,
                matrix_approximation_rank=config.parallel.rank,
                start_powerSGD_iter=TORCH_START,
                random_seed=config.seed,
            )
            self._model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        else:
            self._model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        self._optimizer = AdamW(
            param_groups(model, resblock_map(model).matrices, train.weight_decay, train.moments),
            betas=(train.beta1, train.beta2),
            eps=train.eps,
            variance_clip=train.variance_clip,
        )

    def __call__(self, *inputs: Any) -> Any:
        return self._model(*inputs)

    def backward(self, loss: Tensor) -> None:
        (loss * self._world).backward()  # the hooks take the mean; shares of a loss add up

    def step(self, lr: float) -> float:
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    config, ranks = from_dict(job["config"]), process_group.init()
    torch.set_num_threads(job["threads"])
    torch.manual_seed(config.seed)
    model = LossTransformer(config)
    trainer: Trainer
    if job["hook"]:
        trainer = Replicated(model, config, ranks, job["hook"])
    else:
        trainer = build_engine(
            model, config.train, ranks, parallel=config.parallel, seed=config.seed
        )
    outcome = train(trainer, model, config, ranks, job["steps"])
    Path(job["out"].format(rank=ranks.rank)).write_text(json.dumps(asdict(outcome)))
    process_group.shutdown()


def train(trainer: Trainer, model: nn.Module, config: Config, ranks: Ranks, steps: int) -> Outcome:
    step, stream = stepper(trainer, config, ranks), token_batches(config, ranks)
    schedule, losses = PlateauSchedule(config.train), []
    seconds, processor, sent = [], [], []
    for number in range(1, steps + 1):
        dist.barrier()
        before, busy, start = int(SENT_BYTES.read_text()), time.process_time(), time.perf_counter()
        losses.append(step(next(stream), schedule.rate(number)))
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
        dist.barrier()  # else the other node's last packets would count as the next step's
        sent.append(int(SENT_BYTES.read_text()) - before)
    return Outcome(seconds, processor, sent, losses, digest(model))


def stepper(
    trainer: Trainer, config: Config, ranks: Ranks
) -> Callable[[TokenSample, float], float]:
    """One step by one micro-batch per rank; returns the loss of the whole batch."""
    images = config.train.batch_size * config.transformer.image_tokens

    def step(batch: TokenSample, lr: float) -> float:
        texts = ranks.sum([float(counted_text_targets(batch.text).sum())])[0]
        text, _, image, *_ = trainer(batch.text, batch.codes)
        loss = weighted(text / texts, image / images, config.train.text_loss)
        trainer.backward(loss)
        trainer.step(lr)
        return ranks.sum([loss.item()])[0]

    return step


def token_batches(config: Config, ranks: Ranks) -> Iterator[TokenSample]:
    folder = f"{config.paths.tokens}/train"
    index = ShardIndex.load(folder)
    dataset = TokenDataset(
        folder,
        training_order(folder, config, config.train, ranks),
        Tokenizer.load(config.paths.tokenizer),
        config.transformer.text_tokens,
        fingerprint=index.meta["image_tokenizer"],
        grid=config.transformer.image_grid,
    )
    return batches(
        dataset,
        batch_size=config.train.batch_size,
        micro_batch=config.train.micro_batch,
        rank=ranks.rank,
        world=ranks.world,
        start=0,
        workers=0,
        collate=collate_tokens,
    )


def digest(model: nn.Module) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for parameter in model.parameters():
        whole.update(parameter.detach().numpy())
    return whole.hexdigest()


if __name__ == "__main__":
    main()
