"""fp16 with a scale per resblock under DeepSpeed, on CPUs: one rank and two, every ZeRO stage."""

import dataclasses

import numpy as np
import pytest
import torch

from dalle_dist.config import load
from dalle_dist.distributed.engine import build_engine
from dalle_dist.testing import run_distributed
from dalle_dist.train.held_out import LossTransformer

BATCH, STAGES = 8, (0, 1, 2, 3)
SHAPE = [
    "transformer.layers=2", "transformer.width=64", "transformer.heads=1",
    "transformer.text_tokens=6", "transformer.image_grid=4", "transformer.conv_kernel=3",
    "tokenizer.vocab_size=50", "dvae.image_size=32", "dvae.downsamplings=3",
    "dvae.codebook_size=20", "train.batch_size=8", "train.checkpoint_activations=true",
    "train.precision=fp16", "train.clip=1.0",
]  # fmt: skip


def build(ranks, stage, *overrides):
    config = load("emoji", [*SHAPE, f"train.deepspeed=ds_configs/zero{stage}.json", *overrides])
    torch.manual_seed(0)
    model = LossTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # the unembeddings start at zero
    return build_engine(model, config, ranks)


def backward(engine, ranks, number):
    """All micro-batches of update `number`; the batch is the same for any number of ranks."""
    generator = torch.Generator().manual_seed(number)
    text_BT = torch.randint(2, 50, (BATCH, 6), generator=generator)
    codes_BN = torch.randint(0, 20, (BATCH, 16), generator=generator)
    size, total = BATCH // engine.accumulation // ranks.world, 0.0
    for step in range(engine.accumulation):
        first = (step * ranks.world + ranks.rank) * size
        part = slice(first, first + size)
        text, _, image, _ = engine(text_BT[part], codes_BN[part])
        loss = text / (8 * BATCH * 6) + 7 * image / (8 * BATCH * 16)
        engine.backward(loss)
        total += loss.item()
    return ranks.sum([total])[0]


def course(ranks, stage, micro, updates=5):
    engine = build(ranks, stage, f"train.micro_batch={micro}")
    curve = [(backward(engine, ranks, n), engine.step(1e-3)) for n in range(updates)]
    scales = np.array(engine.scaling.scales.values) / ranks.world
    return {"curve": np.array(curve), "scales": scales, "skipped": engine.skipped}


def courses(ranks, micro):
    return {stage: course(ranks, stage, micro) for stage in STAGES}


if __name__ == "__main__":
    from dalle_dist.distributed import launch
    r = launch.init()
    for s in STAGES:
        for m in (8, 2):
            print(s, m, course(r, s, m))
    print(run_distributed(courses, 2, 4)[0])
    print(run_distributed(courses, 2, 1)[0])
