"""A checkpoint of any ZeRO stage, number of ranks and precision goes on under any other."""

from itertools import product

import checkpointed
import numpy as np
import pytest
import torch
from dalle_kernels.minifloat import pack, unpack

from dalle_dist.checkpoint.manifest import read_manifest
from dalle_dist.checkpoint.read import PACKED, TensorSource
from dalle_dist.testing import run_distributed
from tests.engine import test_engine as toy
from tests.engine import test_fp16 as fp16

STAGES, WORLDS, PRECISIONS = (0, 1, 2, 3), (1, 2, 4), ("fp32", "bf16")
KINDS = ("weights", "exp_avg", "exp_avg_sq")
AHEAD = 5  # steps
# Of losses and norms; gradients of bf16 are rounded, 2^-9 each, in another order by other stages.
CLOSE = {"fp32": [1e-5, 1e-5], "bf16": [2e-3, 1e-2]}


def content(checkpoint, shapes, kinds=KINDS):
    """Whole tensors by kind and name, whoever has cut them."""
    manifest = read_manifest(checkpoint)
    assert set(kinds) <= set(manifest.kinds)
    sources = {kind: TensorSource.of_checkpoint(checkpoint, manifest, kind) for kind in kinds}
    return {
        (kind, name): source.tensor(name, shape).numpy()
        for kind, source in sources.items()
        for name, shape in shapes.items()
    }


def course(engine, ranks):
    return [toy._update(engine, ranks, number) for number in range(3, 3 + AHEAD)]


def saved_by(ranks, folder):
    """A checkpoint of each stage and precision, and the losses and norms that follow."""
    found = {}
    for stage, precision in product(STAGES, PRECISIONS):
        engine = toy._engine(ranks, stage, precision)
        for number in range(3):
            toy._update(engine, ranks, number)
        place = folder / f"{stage}-{ranks.world}-{precision}"
        checkpoint = checkpointed.save_engine(engine, ranks, place)
        found[stage, ranks.world, precision] = checkpoint, course(engine, ranks)
    return found


def translated(ranks, folder, sources):
    """Under each stage and precision: what each checkpoint becomes there, and goes on like."""
    wrong = []
    for stage, precision in product(STAGES, PRECISIONS):
        engine = toy._engine(ranks, stage, precision, seed=5)
        for (origin, world, other), (checkpoint, ahead) in sources.items():
            checkpointed.load_engine(engine, checkpoint)
            name = f"{stage}-{ranks.world}-{precision}-of-{origin}-{world}-{other}"
            again = checkpointed.save_engine(engine, ranks, folder / name)
            before, after = (content(path, engine.shapes) for path in (checkpoint, again))
            same = all(np.array_equal(before[key], after[key]) for key in before)
            steps = read_manifest(again).training["optimizer_steps"]
            curve = course(engine, ranks)
            apart = np.abs(np.array(curve) / np.array(ahead) - 1).max(axis=0)
            near = other != precision or bool((apart <= CLOSE[precision]).all())
            if (stage, ranks.world, precision) == (origin, world, other):
                near = curve == ahead
            if not (same and near and steps == 3):
                wrong.append((name, same, apart, steps))
    return wrong


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return {
        key: found
        for world in WORLDS
        for key, found in run_distributed(saved_by, world, folder)[0].items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_round_trips_keep_every_bit_and_the_course(sources, world, tmp_path):
    assert len(sources) == len(STAGES) * len(WORLDS) * len(PRECISIONS)
    for wrong in run_distributed(translated, world, tmp_path, sources, timeout=500):
        assert wrong == []


def other_moments(ranks, folder, stage):
    """fp32 moments into 16 bits and the other way round."""
    engines = {
        moments: fp16.build(ranks, stage, f"train.moments={moments}", "train.micro_batch=4")
        for moments in ("fp32", "16-bit")
    }
    wrong = []
    for origin, goal in (("fp32", "16-bit"), ("16-bit", "fp32")):
        engine, other = engines[origin], engines[goal]
        fp16.backward(engine, ranks, 0)
        engine.step(1e-3)
        one = checkpointed.save_engine(engine, ranks, folder / f"{stage}-{origin}")
        checkpointed.load_engine(other, one)
        two = checkpointed.save_engine(other, ranks, folder / f"{stage}-{origin}-{goal}")
        before, after = (content(path, engine.shapes) for path in (one, two))
        packed = other.transform._resblocks.matrices
        for (kind, name), values in before.items():
            expected = torch.from_numpy(values)
            if kind in PACKED and name in packed and goal == "16-bit":
                expected = unpack(pack(expected, PACKED[kind]), PACKED[kind])
            if not np.array_equal(expected.numpy(), after[kind, name]):
                wrong.append((stage, origin, kind, name))
        scales = [e.transform.scaling.state_dict() for e in (engine, other)]
        if scales[0] != scales[1]:
            wrong.append((stage, origin, "scales"))
    return wrong


@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_moments_are_translated_and_scales_kept(tmp_path, stage):
    assert run_distributed(other_moments, 2, tmp_path, stage) == [[], []]


def without_scales(ranks, folder):
    """A run in fp32 goes on in fp16: its scales begin anew."""
    plain = fp16.build(ranks, 1, "train.precision=fp32", "train.micro_batch=8")
    fp16.backward(plain, ranks, 0)
    plain.step(1e-3)
    place = checkpointed.save_engine(plain, ranks, folder)
    scaled = fp16.build(ranks, 1, "train.micro_batch=8")
    first = scaled.transform.scaling.state_dict()
    checkpointed.load_engine(scaled, place)
    return first == scaled.transform.scaling.state_dict()


def test_a_run_without_scales_goes_on_in_fp16(tmp_path):
    assert run_distributed(without_scales, 1, tmp_path) == [True]
