"""Images per second of stage 1's training step on the CPU, and a plain PyTorch loop's.

Ours goes through the engine that trains: DeepSpeed without ZeRO, our AdamW, the gradient's norm,
the moving average. The plain loop has none of the last two and torch's fused AdamW. Both compute
under bf16 autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import common, rivals
from benchmarks.common import Measured
from dalle_dist.config import Config, load
from dalle_dist.distributed import process_group
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.dvae.loss_model import LossDVAE, gumbel_noise
from dalle_dist.optim.ema import EMA
from dalle_dist.train.dvae import dvae_engine

TEMPERATURE = 1.0
CLOSE = 1e-3  # relative error of the second step's loss in fp32
PLAIN, OURS, CONTIGUOUS = "plain loop", "ours", "ours, contiguous weights"
Batch = tuple[Tensor, Tensor]


def main() -> None:
    options = common.arguments(__doc__, rounds=5)
    ranks = process_group.init()
    if ranks.device.type != "cpu":
        print("dvae_step: not measured: its rival's settings are for CPUs")
        process_group.shutdown()
        return
    config = load("emoji", ["dvae_train.precision=fp32"])  # of the weights
    batch = random_batch(config)
    check(cases(config, batch, ranks, bf16=False))
    timed = cases(config, batch, ranks, bf16=True)
    steps = 2 if options.smoke else 50
    times = common.interleaved(
        {name: _several(s, steps) for name, s in timed.items()}, options.rounds
    )
    common.report("dvae_step", config, figures(config, times, steps), options)
    process_group.shutdown()


def random_batch(config: Config) -> Batch:
    """images_BCHW, channels-last as in training, and noise_BKGG."""
    shape, batch = config.dvae, config.dvae_train.batch_size
    images_BCHW = torch.rand(batch, 3, shape.image_size, shape.image_size)
    noise = (shape.codebook_size, shape.grid, shape.grid)
    noise_BKGG = gumbel_noise(noise, 0, range(batch), torch.device("cpu"))
    return images_BCHW.contiguous(memory_format=torch.channels_last), noise_BKGG


def check(steps: dict[str, Callable[[], float]]) -> None:
    """Exit unless all of them take the same first step."""
    losses = {name: [step(), step()][1] for name, step in steps.items()}
    if not max(losses.values()) - min(losses.values()) <= CLOSE * abs(losses[PLAIN]):
        raise SystemExit(f"not timed: losses after one step differ: {losses}")


def cases(config: Config, batch: Batch, ranks: Ranks, bf16: bool) -> dict[str, Callable[[], float]]:
    """One step each, which returns its loss."""
    return {
        PLAIN: _plain(config, batch, bf16),
        OURS: _ours(config, batch, ranks, bf16, torch.channels_last),
        CONTIGUOUS: _ours(config, batch, ranks, bf16, torch.contiguous_format),
    }


def figures(config: Config, times: dict[str, list[float]], steps: int) -> list[Measured]:
    """Rates, and ours round by round against the others."""
    images = steps * config.dvae_train.batch_size
    rows = [
        Measured(name, "training step", "images/s", [images / t for t in took])
        for name, took in times.items()
    ]
    for name in (PLAIN, CONTIGUOUS):
        pairs = zip(times[name], times[OURS], strict=True)
        rows.append(Measured(f"ours / {name}", "speed", "x", [t / o for t, o in pairs]))
    return rows


def _several(step: Callable[[], float], steps: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(steps):
            step()

    return run


def _plain(config: Config, batch: Batch, bf16: bool) -> Callable[[], float]:
    settings = config.dvae_train
    torch.manual_seed(0)
    model = LossDVAE(config.dvae, bf16).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    losses = [0.0]

    def loss() -> Tensor:
        nll, kl = model(*batch, TEMPERATURE)
        total: Tensor = nll + kl
        losses[0] = total.item()
        return total

    step = rivals.trainer(loss, optimizer)

    def run() -> float:
        step()
        return losses[0]

    return run


def _ours(
    config: Config, batch: Batch, ranks: Ranks, bf16: bool, layout: torch.memory_format
) -> Callable[[], float]:
    torch.manual_seed(0)
    engine = dvae_engine(LossDVAE(config.dvae, bf16), config.dvae_train, ranks)
    engine.module.to(memory_format=layout)
    average = EMA(config.dvae_train.ema, device=None)

    def run() -> float:
        nll, kl = engine(*batch, TEMPERATURE)
        engine.backward(nll + kl)
        engine.step(config.dvae_train.lr)
        average.update(engine.weights())
        return float((nll + kl).detach())

    return run


if __name__ == "__main__":
    main()
