"""Time of a training step in fp16 with a scale per resblock, against bf16 at the same shape.

Through the engine that trains, ZeRO-2 in one process, AdamW and clipping included. For a GPU: on a
CPU fp16 products run through fp32, and their time says nothing (--smoke proves that it runs).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from benchmarks import common
from benchmarks.common import Measured
from dalle_dist.config import Config, from_dict
from dalle_dist.distributed import process_group
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.deepspeed.build import build_engine
from dalle_dist.transformer.layout import counted_text_targets
from dalle_dist.transformer.loss import weighted
from dalle_dist.transformer.loss_model import LossTransformer

PRECISIONS = ("bf16", "fp16")
CLOSE = 0.02  # of the losses of both after as many steps


def main() -> None:
    options = common.arguments(__doc__, rounds=20)
    ranks = process_group.init()
    if ranks.device.type != "cuda" and not options.smoke:
        print("precision_cost: not measured: no GPU")
        process_group.shutdown()
        return
    steps = {p: step(cost_config(options.smoke, p), ranks) for p in PRECISIONS}
    losses: dict[str, list[float]] = {p: [] for p in PRECISIONS}
    times = common.interleaved(
        {p: lambda p=p: losses[p].append(steps[p]()) for p in PRECISIONS}, options.rounds
    )
    check(losses)
    config = cost_config(options.smoke, "fp16")
    common.report("precision_cost", config, figures(times), options, ranks.device)
    process_group.shutdown()


def cost_config(smoke: bool, precision: str) -> Config:
    """d=1024, 16 heads of 64, 12 layers, 256 + 1024 tokens, batch 8: 151 M values in matrices."""
    wide = {"width": 1024, "heads": 16, "layers": 12, "text_tokens": 256, "image_grid": 32}
    tiny = {
        "width": 64,
        "heads": 1,
        "layers": 2,
        "text_tokens": 16,
        "image_grid": 4,
        "codebook_size": 32,
    }
    return from_dict(
        {
            "name": "smoke" if smoke else "d1024-l12",
            "tokenizer": {"vocab_size": 300 if smoke else 16_384},
            "dvae": {"image_size": 32 if smoke else 256, "codebook_size": 32 if smoke else 8_192},
            "transformer": {**(tiny if smoke else wide), "conv_kernel": 3 if smoke else 11},
            "train": {
                "precision": precision, "checkpoint_activations": False, "batch_size": 8,
                "micro_batch": 8, "lr": 1e-4, "zero_stage": 2,
            },
        }
    )  # fmt: skip


def step(config: Config, ranks: Ranks) -> Callable[[], float]:
    """One step on the same batch each time; returns the loss, which waits for the device."""
    torch.manual_seed(0)
    engine = build_engine(LossTransformer(config), config.train, ranks, seed=config.seed)
    text_BT, codes_BN = (t.to(ranks.device) for t in common.random_batch(config, 8))
    texts, images = int(counted_text_targets(text_BT).sum()), codes_BN.numel()

    def run() -> float:
        text, _, image, _ = engine(text_BT, codes_BN)
        loss = weighted(text / texts, image / images, config.train.text_loss)
        engine.backward(loss)
        engine.step(config.train.lr)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    return run


def check(losses: dict[str, list[float]]) -> None:
    """Refuse to report steps that do not train, or not the same model."""
    bf16, fp16 = (losses[p] for p in PRECISIONS)
    if not all(math.isfinite(loss) for loss in [*bf16, *fp16]):
        raise SystemExit("a loss is not finite")
    if not (bf16[-1] < bf16[0] and fp16[-1] < fp16[0]):
        raise SystemExit("a loss does not fall")
    if not math.isclose(bf16[-1], fp16[-1], rel_tol=CLOSE):
        raise SystemExit(f"losses differ: {bf16[-1]:.4g} in bf16, {fp16[-1]:.4g} in fp16")


def figures(times: dict[str, list[float]]) -> list[Measured]:
    rows = [
        Measured(p, "training step", "ms", [1e3 * t for t in took]) for p, took in times.items()
    ]
    pairs = zip(times["fp16"], times["bf16"], strict=True)
    return [*rows, Measured("fp16 / bf16", "step time", "x", [f / b for f, b in pairs])]


if __name__ == "__main__":
    main()
