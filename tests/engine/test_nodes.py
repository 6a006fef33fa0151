"""ZeRO inside each node and means between them; processes are the ranks."""

import contextlib
import hashlib
import io
import itertools

import checkpointed
import numpy as np
import pytest
import torch

from dalle_dist.engine.deepspeed.build import build_engine
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.optim.ema import EMA
from dalle_dist.optim.plateau_schedule import PlateauSchedule
from dalle_dist.testing import run_distributed
from dalle_dist.train.data import Progress
from dalle_dist.train.state import Identity, TrainingState
from tests.engine.test_fp16 import (
    backward,
    changed,
    config_of,
    model_of,
    spoil,
    state_of,
)

STAGES, PRECISIONS = (1, 2, 3), ("fp32", "bf16", "fp16")
SLOWLY = pytest.mark.slow
# All three in the slow tests; ZeRO-2, which the presets take, in the quick ones too.
FULL_STAGES = [pytest.param(s, marks=[] if s == 2 else SLOWLY) for s in STAGES]
IN_PARTS = {1: "bf16", 2: "fp16", 3: "fp32"}  # by stage, what is accumulated too
BATCH = 24  # divides among 2, 3 and 4 ranks, once and in four parts


def config_on(ranks, stage, between, *overrides, size=2, parts=1):
    """`size` ranks to a node, `parts` micro-batches; matrices are 64 wide and more."""
    return config_of(
        stage, f"train.batch_size={BATCH}",
        f"train.micro_batch={BATCH // ranks.world // parts}",
        f"parallel.between_nodes={between}", f"parallel.local_world_size={size}",
        "parallel.rank_of=shard", "parallel.rank=8", "parallel.comm_dtype=fp32", *overrides,
    )  # fmt: skip


def build_on(ranks, stage, between, *overrides, **layout):
    return build_from(config_on(ranks, stage, between, *overrides, **layout), ranks)


def build_from(config, ranks):
    parallel, seed = config.parallel, config.seed
    return build_engine(model_of(config), config.train, ranks, parallel=parallel, seed=seed)


def update(engine, ranks, number):
    return backward(engine, ranks, number, BATCH), engine.step(3e-3, measure=True)


def digest(engine):
    """Of this rank's live weights."""
    sha = hashlib.sha256()
    for fragment in engine.owned():
        sha.update(fragment.values.detach().numpy().tobytes())
    return sha.hexdigest()


def course(ranks, stage, between, *overrides, steps=6, **layout):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        engine = build_on(ranks, stage, between, *overrides, **layout)
        curve = [update(engine, ranks, number) for number in range(steps)]
    return {
        "curve": np.array(curve), "digest": digest(engine), "said": said.getvalue(),
        "numbers": engine.telemetry(), "skipped": engine.skipped,
    }  # fmt: skip


def courses(ranks, stage):
    """Two nodes of two ranks."""
    found = {
        (between, precision): course(ranks, stage, between, f"train.precision={precision}")
        for between in ("zero", "dense", "powersgd")
        for precision in PRECISIONS
    }
    twice = course(ranks, stage, "powersgd", f"train.precision={IN_PARTS[stage]}", parts=2)
    return found | {("powersgd", "in parts"): twice, "precision": IN_PARTS[stage]}


@pytest.fixture(
    scope="module",
    params=[pytest.param(s, marks=SLOWLY) for s in STAGES],
    ids=["zero1", "zero2", "zero3"],
)
def four(request):
    return run_distributed(courses, 4, request.param)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_dense_means_between_nodes_are_zero_over_all_ranks(four, precision):
    close = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 3e-4}[precision]
    for rank in four:
        found, expected = (rank[between, precision]["curve"] for between in ("dense", "zero"))
        assert np.allclose(found, expected, rtol=close)


@pytest.mark.parametrize(
    ("between", "precision"),
    [*itertools.product(["dense", "powersgd"], PRECISIONS), ("powersgd", "in parts")],
)
def test_replicas_have_the_same_bits_after_some_updates(four, between, precision):
    digests = [rank[between, precision]["digest"] for rank in four]
    assert digests[:2] == digests[2:] and digests[0] != digests[1]
    curves = [rank[between, precision]["curve"] for rank in four]
    assert all(np.array_equal(curve, curves[0]) for curve in curves)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_powersgd_follows_the_dense_course_and_sends_less(four, precision):
    compressed, dense = (four[0][b, precision] for b in ("powersgd", "dense"))
    losses = [found["curve"][:, 0] for found in (compressed, dense)]
    assert np.allclose(*losses, rtol=2e-3) and not np.array_equal(*losses)
    numbers = compressed["numbers"]
    assert len(numbers["compression_error"]) == 8
    assert all(0 < error < 0.9 for error in numbers["compression_error"])
    assert 0 < numbers["sent_megabytes"] < 0.5 * numbers["dense_megabytes"]
    assert "PowerSGD at rank 8 per shard leaves out" in compressed["said"]
    assert four[1]["powersgd", precision]["said"] == ""


def test_compressed_gradients_may_be_accumulated(four):
    precision = four[0]["precision"]
    once, twice = (four[0]["powersgd", p]["curve"] for p in (precision, "in parts"))
    assert np.allclose(twice, once, rtol={"fp32": 1e-5, "bf16": 3e-3, "fp16": 2e-4}[precision])


def layouts(ranks, size):
    return [
        course(ranks, 2, between, "train.precision=fp32", size=size, parts=parts)
        for between, parts in (("zero", 1), ("dense", 1), ("powersgd", 1), ("powersgd", 2))
    ]


@pytest.mark.parametrize(("nodes", "size"), [(3, 1), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_nodes_of_one_rank(nodes, size):
    found = run_distributed(layouts, nodes * size, size)
    zero, dense, once, twice = (run["curve"] for run in found[0])
    assert np.allclose(dense, zero, rtol=1e-5)
    assert np.allclose(once[:, 0], zero[:, 0], rtol=2e-3)
    assert np.allclose(once, twice, rtol=1e-4), "accumulation changes nothing"
    for number in (1, 2, 3):
        assert len({rank[number]["digest"] for rank in found}) == 1, "replicas of the weights"


def clipped(ranks, between):
    engine = build_on(ranks, 2, between, "train.precision=fp32", "train.clip=0.01")
    norms = [update(engine, ranks, number)[1] for number in range(3)]
    means = torch.stack([values[1].norm() for values in state_of(engine).values()])
    return norms, float(means.norm())


@pytest.mark.slow
def test_clipping_takes_the_norm_of_what_came_out_of_the_compression():
    """The mean of three gradients clipped to 0.01 is at most 0.271 of that, on a whole node."""
    for between in ("dense", "powersgd"):
        ranks = run_distributed(clipped, 4, between)
        assert min(ranks[0][0]) > 0.05
        machine = np.hypot(ranks[0][1], ranks[1][1])
        assert 0.1 * 0.01 < machine <= 0.271 * 0.01 * 1.001


def errors_of(engine):
    """PowerSGD's error buffers of this rank, by shard."""
    held = engine.transform.node_mean.errors()
    return {key: [error.clone()] for key, error in held.items()}


def overflow(ranks, stage, precision, skip):
    """A good update, then one with an infinity in one block on the last rank alone."""
    engine = build_on(ranks, stage, "powersgd", f"train.precision={precision}",
                      f"train.skip={skip}", "train.clip=0")  # fmt: skip
    update(engine, ranks, 0)
    weights, errors = state_of(engine), errors_of(engine)
    handle = spoil(engine, "blocks.1.attention.out") if ranks.rank == 3 else None
    backward(engine, ranks, 1, BATCH)
    engine.step(3e-3)
    if handle is not None:
        handle.remove()
    return {
        "weights": changed(weights, state_of(engine)), "all": set(weights),
        "errors": changed(errors, errors_of(engine)), "keys": set(errors),
        "skipped": engine.skipped, "digest": digest(engine),
        "finite": all(e[0].isfinite().all() for e in errors_of(engine).values()),
    }  # fmt: skip


def assert_errors_took_what_was_finite(number, rank, spoiled):
    """All on the first node; on the second, ranks 2 and 3, all but the spoiled resblocks' own."""
    spoiled = {key for key in rank["keys"] if number >= 2 and key.startswith(spoiled)}
    assert rank["errors"] == rank["keys"] - spoiled and rank["finite"]


@pytest.mark.parametrize("stage", FULL_STAGES)
@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=SLOWLY)])
def test_an_infinity_on_one_rank_skips_the_step_everywhere_and_enters_no_error(precision, stage):
    """What is finite enters the error buffers, to come with the next step."""
    found = run_distributed(overflow, 4, stage, precision, "step")
    # In fp16 the resblocks before go on with finite gradients.
    spoiled = ("blocks.1.attention.", *(["blocks.0."] if precision == "bf16" else []))
    for number, rank in enumerate(found):
        assert rank["skipped"] and rank["weights"] == set()
        assert_errors_took_what_was_finite(number, rank, spoiled)
    assert found[0]["digest"] == found[2]["digest"] and found[1]["digest"] == found[3]["digest"]


@pytest.mark.parametrize("stage", FULL_STAGES)
def test_an_infinity_on_one_rank_costs_its_block_alone(stage):
    found = run_distributed(overflow, 4, stage, "fp16", "block")
    for number, rank in enumerate(found):
        inside = {name for name in rank["all"] if name.startswith("blocks.1.attention.")}
        assert not rank["skipped"] and rank["weights"] == rank["all"] - inside
        assert_errors_took_what_was_finite(number, rank, ("blocks.1.attention.",))
    assert found[0]["digest"] == found[2]["digest"] and found[1]["digest"] == found[3]["digest"]


def state_on(ranks, stage, *overrides):
    config = config_on(ranks, stage, "powersgd", "train.ema_every=1", *overrides, size=1)
    engine = build_from(config, ranks)
    train = config.train
    schedule, ema = PlateauSchedule(train), EMA(train.ema)
    identity = Identity("transformer", config, train, train.precision)
    return engine, TrainingState(identity, ranks, engine, ema, schedule, Progress(0, {}, 1))


def save_midway(ranks, folder, stage, *overrides):
    """Four updates, a checkpoint, and where the run goes from there."""
    engine, state = state_on(ranks, stage, *overrides)
    for number in range(4):
        update(engine, ranks, number)
        state.ema.update(engine.weights())
    state.step = 4
    place = checkpointed.save_state(state, folder)
    return place, np.array([update(engine, ranks, number) for number in range(4, 9)])


def go_on(ranks, place, stage, forget, *overrides):
    engine, state = state_on(ranks, stage, *overrides)
    state.load(place)
    assert state.step == 4 and state.ema.updates == 4
    if forget:
        for error in engine.transform.node_mean._powersgd._state._loaded["errors"].values():
            error.zero_()
    return np.array([update(engine, ranks, number) for number in range(4, 9)])


def resumed(folder, stage, forget, *overrides, before=3, after=2):
    """Losses and norms of `after` ranks that go on where `before` saved, and of those."""
    place, ahead = run_distributed(save_midway, before, folder, stage, *overrides)[0]
    return run_distributed(go_on, after, place, stage, forget, *overrides)[0], ahead


@pytest.mark.parametrize(
    ("stage", "overrides", "close"),
    [
        (2, ["train.precision=fp32", "parallel.warm_start=true"], 1e-5),
        pytest.param(1, ["train.precision=fp32"], 1e-5, marks=pytest.mark.slow),
        pytest.param(3, ["train.precision=fp32"], 1e-5, marks=pytest.mark.slow),
        pytest.param(1, ["train.precision=bf16"], 2e-3, marks=pytest.mark.slow),
        pytest.param(
            3, ["train.precision=fp16", "train.moments=16-bit"], 5e-4, marks=pytest.mark.slow
        ),
    ],
)
def test_saved_on_three_nodes_and_gone_on_with_on_two(tmp_path, stage, overrides, close):
    """PowerSGD's output depends on the nodes' mean error alone, and that is what is saved."""
    found, ahead = resumed(tmp_path, stage, False, *overrides)
    assert np.allclose(found, ahead, rtol=close)


@pytest.mark.slow
def test_saved_on_two_nodes_of_two_ranks_and_gone_on_with_on_one(tmp_path):
    """One node sends nothing; two are like it in the step that empties their buffers."""
    overrides = "train.precision=fp32", "parallel.local_world_size=2", "parallel.dense_every=4"
    found, ahead = resumed(tmp_path, 3, False, *overrides, before=4)
    assert np.allclose(found[0], ahead[0], rtol=1e-5)
    assert np.allclose(found[1, 0], ahead[1, 0], rtol=1e-5)


@pytest.mark.slow
def test_errors_that_are_not_saved_would_be_missed(tmp_path):
    """Norms, which show it first; losses follow."""
    found, ahead = resumed(tmp_path, 2, True, "train.precision=fp32")
    assert not np.allclose(found[:, 1], ahead[:, 1], rtol=5e-4)


def refused(ranks, overrides, stage):
    try:
        engine = build_on(ranks, stage, "powersgd", *overrides)
        update(engine, ranks, 0)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("overrides", "stage", "said"),
    [
        (
            ["parallel.local_world_size=3"],
            2,
            "parallel.local_world_size: 3 does not divide 2 ranks",
        ),
        ([], 0, "parallel.between_nodes: powersgd needs train.zero_stage 1, 2 or 3"),
        (["parallel.rank=64"], 2, "attention.qkv.weight of shape 64x64; the largest allowed is 63"),
        (["parallel.rank=32"], 3, "attention.qkv.weight of shape 32x64; the largest allowed is 31"),
        (["parallel.rank_of=node", "parallel.rank=9"], 2, "parallel.rank: 9 is not a multiple"),
    ],
)
def test_what_cannot_be_compressed_is_refused_in_one_line(overrides, stage, said):
    for message in run_distributed(refused, 2, overrides, stage):
        assert said in message and "\n" not in message


def diverged(ranks, folder):
    """One bit of one weight differs on one node."""
    engine = build_on(ranks, 2, "dense", "train.precision=fp32")
    checkpointed.save_engine(engine, ranks, folder)
    if ranks.rank == 2:
        with torch.no_grad():
            engine.owned()[3].values[:1].mul_(1 + 2**-22)
    with pytest.raises(CheckpointError) as caught:
        checkpointed.save_engine(engine, ranks, folder)
    return str(caught.value)


@pytest.mark.slow
def test_nodes_that_have_come_apart_do_not_save(tmp_path):
    for message in run_distributed(diverged, 4, tmp_path):
        assert "the nodes' weights differ" in message and "\n" not in message


def alone(ranks, between):
    return course(ranks, 2, between, "train.precision=fp32", size=1)["curve"]


@pytest.mark.slow
def test_a_single_machine_compresses_nothing():
    compressed, dense = (run_distributed(alone, 1, between)[0] for between in ("powersgd", "zero"))
    assert np.allclose(compressed, dense, rtol=1e-6)
