"""Models that come from the meta device: the same weights by any stage and any number of ranks."""

import resource

import pytest
import torch
from torch import nn

from dalle_dist.config import load
from dalle_dist.engine.deepspeed import build
from dalle_dist.gradients.piece import assemble
from dalle_dist.testing import run_distributed
from dalle_dist.transformer.loss_model import loss_transformer, unmade_transformer

SHAPE = [
    "transformer.heads=2", "transformer.width=128", "transformer.layers=2",
    "transformer.text_tokens=6", "transformer.image_grid=4", "transformer.conv_kernel=3",
    "tokenizer.vocab_size=51", "dvae.image_size=32", "dvae.downsamplings=3",
    "dvae.codebook_size=20", "transformer.codebook_size=20", "train.batch_size=4",
    "train.micro_batch=1", "train.clip=1.0", "seed=7",
]  # fmt: skip
CASES = [
    (0, "fp32", "zero"), (1, "bf16", "zero"), (2, "fp16", "zero"), (3, "fp32", "zero"),
    (3, "bf16", "zero"), (3, "fp16", "zero"), (2, "fp32", "dense"), (3, "fp16", "dense"),
]  # fmt: skip


def config_of(stage, precision, between):
    overrides = [
        f"train.zero_stage={stage}", f"train.precision={precision}",
        f"parallel.between_nodes={between}", "parallel.local_world_size=2",
    ]  # fmt: skip
    return load("emoji", [*SHAPE, *overrides])


def weights(ranks, case):
    config = config_of(*case)
    torch.manual_seed(1000 + ranks.rank)  # of no effect
    engine = build.build_engine(
        unmade_transformer(config),
        config.train,
        ranks,
        parallel=config.parallel,
        seed=config.seed,
    )
    parts = ranks.gather({piece.key: piece.values.clone() for piece in engine.weights()})
    whole = assemble({key: v for part in parts for key, v in part.items()}, engine.shapes)
    engine.refuse_diverged()
    return {name: values.numpy() for name, values in whole.items()}


def all_weights(ranks, cases):
    return [weights(ranks, case) for case in cases]


@pytest.mark.parametrize("world", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_every_stage_and_world_starts_from_the_weights_of_one_process(world):
    cases = [case for case in CASES if case[2] == "zero" or world > 1]
    found = run_distributed(all_weights, world, cases)[0]
    torch.manual_seed(7)
    for case, shown in zip(cases, found, strict=True):
        model = loss_transformer(config_of(*case))
        for name, parameter in model.named_parameters():
            value = parameter.detach()
            value = value.bfloat16().float() if case[1] == "bf16" else value
            assert torch.equal(torch.from_numpy(shown[name]), value), (case, name)


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def memory(ranks):
    """(bytes that the peak rose by while the weights were sharded, the shards', a layer's)."""
    wide = ["transformer.width=512", "transformer.heads=8", "transformer.layers=16"]
    config = load("emoji", [*SHAPE, *wide, "train.zero_stage=3", "train.precision=fp32"])
    weights(ranks, (3, "fp32", "zero"))  # what is imported for the first time is not meant
    model = unmade_transformer(config)
    layer = 4 * sum(parameter.numel() for parameter in model.blocks[0].parameters())
    rose, sharded = [], build.sharded_weights

    def measured(*arguments):
        before = peak_bytes()
        sharded(*arguments)
        rose.append(peak_bytes() - before)

    build.sharded_weights = measured
    build.build_engine(model, config.train, ranks, seed=7)
    shards = 4 * sum(p.ds_tensor.numel() for p in model.parameters())
    return rose[0], shards, layer


def test_a_process_holds_its_shards_and_less_than_two_layers():
    for rose, shards, layer in run_distributed(memory, 2):
        assert shards > 6 * layer
        # Some of it may be memory that was free already.
        assert 0.7 * shards < rose < shards + 2 * layer


class _Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, device="meta"))


def test_a_model_that_does_not_say_what_it_starts_from_is_refused():
    found = run_distributed(refusal, 1)[0]
    assert "does not say what it starts from" in found


def refusal(ranks):
    try:
        build.build_engine(_Silent(), config_of(0, "fp32", "zero").train, ranks)
    except ValueError as error:
        return str(error)
    return ""
