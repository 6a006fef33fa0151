"""One rank of powersgd_network.py: trains one contender after another, and tells what steps took.

`python -m benchmarks.powersgd_rank JOBS.json`, in the environment that a launcher would set. The
same loader, loss, optimizer and schedule for all; what differs is who averages the gradients, and
how.

Shape suffixes: B batch, T text positions, N image tokens.
"""

from __future__ import annotations

import hashlib
import json
import statistics
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
HELD_OUT = 8  # batches that nobody has trained on, after the last step


@dataclass(frozen=True)
class Outcome:
    """Of one rank. Lists have one number per step."""

    seconds: list[float]
    cpu_seconds: list[float]  # of this process, gloo's threads among it
    sent_bytes: list[int]  # by this node's network interface, headers and all
    losses: list[float]  # of the whole batch; where nodes train apart, each by its own weights
    held_out: float  # mean loss of batches after the last step, by weights that all nodes share
    weights: str  # digest of all of them


class Trainer(Protocol):
    """What `Engine` offers, and `Replicated` below does like it."""

    def __call__(self, *inputs: Any) -> Any: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, lr: float) -> float: ...

    def settle(self) -> None: ...


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

    def settle(self) -> None:
        """Ranks never differ."""


def main() -> None:
    ranks = process_group.init()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        outcome = run(job, ranks)
        Path(job["out"].format(rank=ranks.rank)).write_text(json.dumps(asdict(outcome)))
        if ranks.rank == 0:
            seconds = statistics.median(outcome.seconds)
            print(f"{job['name']}: {seconds:.3g} s, {outcome.held_out:.4g} nats", flush=True)
    process_group.shutdown()


def run(job: dict[str, Any], ranks: Ranks) -> Outcome:
    config = from_dict(job["config"])
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
    return train(trainer, model, config, ranks, job["steps"])


def train(trainer: Trainer, model: nn.Module, config: Config, ranks: Ranks, steps: int) -> Outcome:
    loss_of, stream = losses_of(trainer, config, ranks), token_batches(config, ranks)
    schedule, losses = PlateauSchedule(config.train), []
    seconds, processor, sent = [], [], []
    for number in range(1, steps + 1):
        dist.barrier()
        before, busy, start = int(SENT_BYTES.read_text()), time.process_time(), time.perf_counter()
        loss = loss_of(next(stream))
        trainer.backward(loss)
        trainer.step(schedule.rate(number))
        losses.append(ranks.sum([loss.item()])[0])
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
        dist.barrier()  # else the other node's last packets would count as the next step's
        sent.append(int(SENT_BYTES.read_text()) - before)
    trainer.settle()
    with torch.no_grad():
        held_out = [loss_of(next(stream)).item() for _ in range(HELD_OUT)]
    mean = ranks.sum([statistics.mean(held_out)])[0]
    return Outcome(seconds, processor, sent, losses, mean, digest(model))


def losses_of(trainer: Trainer, config: Config, ranks: Ranks) -> Callable[[TokenSample], Tensor]:
    """This rank's share of a batch's loss, by one micro-batch per rank."""
    images = config.train.batch_size * config.transformer.image_tokens

    def loss_of(batch: TokenSample) -> Tensor:
        texts = ranks.sum([float(counted_text_targets(batch.text).sum())])[0]
        text, _, image, *_ = trainer(batch.text, batch.codes)
        return weighted(text / texts, image / images, config.train.text_loss)

    return loss_of


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
