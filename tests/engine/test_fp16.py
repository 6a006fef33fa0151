"""fp16 with a scale per resblock under DeepSpeed, on CPUs: one rank and two, every ZeRO stage."""

import checkpointed
import numpy as np
import pytest
import torch

from dalle_dist.config import load
from dalle_dist.engine.deepspeed.build import build_engine
from dalle_dist.optim.adamw import MOMENT_NAMES
from dalle_dist.testing import run_distributed
from dalle_dist.text_tokenizer.protocol import PAD
from dalle_dist.transformer.loss_model import LossTransformer

BATCH, STAGES = 8, (0, 1, 2, 3)
SHAPE = [
    "transformer.layers=2", "transformer.width=64", "transformer.heads=1",
    "transformer.scale_embeddings=false",
    "transformer.text_tokens=6", "transformer.image_grid=4", "transformer.conv_kernel=3",
    "tokenizer.vocab_size=50", "dvae.image_size=32", "dvae.downsamplings=3",
    "dvae.codebook_size=20", "transformer.codebook_size=20", "train.batch_size=8",
    "train.checkpoint_activations=true", "train.precision=fp16", "train.clip=1.0",
]  # fmt: skip


def config_of(stage, *overrides):
    return load("emoji", [*SHAPE, f"train.zero_stage={stage}", *overrides])


def model_of(config):
    torch.manual_seed(0)
    model = LossTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # the unembeddings start at zero
    return model


def build(ranks, stage, *overrides):
    config = config_of(stage, *overrides)
    parallel, seed = config.parallel, config.seed
    return build_engine(model_of(config), config.train, ranks, parallel=parallel, seed=seed)


def backward(engine, ranks, number, batch=BATCH):
    """All micro-batches of update `number`; the batch is the same for any number of ranks."""
    generator = torch.Generator().manual_seed(number)
    text_BT = torch.randint(2, 50, (batch, 6), generator=generator)
    text_BT[::2, 1:] = PAD
    codes_BN = torch.randint(0, 20, (batch, 16), generator=generator)
    size, total = batch // engine.accumulation // ranks.world, 0.0
    for step in range(engine.accumulation):
        first = (step * ranks.world + ranks.rank) * size
        part = slice(first, first + size)
        text, _, image, _ = engine(text_BT[part], codes_BN[part])
        loss = text / (8 * batch * 6) + 7 * image / (8 * batch * 16)
        engine.backward(loss)
        total += loss.item()
    return ranks.sum([total])[0]


def course(ranks, stage, micro):
    """Loss and norm of five updates, and the scales of one replica after them.

    In the third update the second block's scale is so large that all of its gradient overflows.
    """
    engine = build(ranks, stage, f"train.micro_batch={micro}", "train.skip=block")
    scales, curve = engine.transform.scaling.scales, []
    for number in range(5):
        if number == 2:
            scales.scale_K[1] = 2.0**60
        curve.append((backward(engine, ranks, number), engine.step(1e-3)))
    return {
        "curve": np.array(curve), "scales": np.array(scales.values), "overflows": scales.overflows,
    }  # fmt: skip


def courses(ranks, micro):
    return {stage: course(ranks, stage, micro // ranks.world) for stage in STAGES}


@pytest.fixture(
    scope="module",
    params=[pytest.param(8, marks=pytest.mark.slow), 2],
    ids=["accumulation-1", "accumulation-4"],
)
def runs(request):
    alone = run_distributed(course, 1, 0, request.param)[0]
    return alone, run_distributed(courses, 2, request.param)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_have_the_losses_and_scales_of_one(runs, stage):
    alone, pair = runs
    for outcomes in pair:
        losses, norms = outcomes[stage]["curve"].T
        assert np.allclose(losses, alone["curve"][:, 0], rtol=1e-5)
        assert np.allclose(norms, alone["curve"][:, 1], rtol=1e-4), "beyond fp16's rounding"
        assert np.array_equal(outcomes[stage]["scales"] / 2, alone["scales"])
        assert outcomes[stage]["overflows"] == alone["overflows"]
    assert alone["overflows"][1] > 0 and alone["overflows"][0] == alone["overflows"][3] == 0
    assert alone["scales"][0] > 2**13
    assert np.array_equal(pair[0][stage]["curve"], pair[1][stage]["curve"])


def kinds(ranks, stage):
    """Of each owned gradient before it is unscaled: is it an fp16 matrix, would fp16 hold it?"""
    engine = build(ranks, stage, f"train.micro_batch={8 // ranks.world}")
    backward(engine, ranks, 0)
    return [
        (f.name in engine._resblocks.matrices, f.values.half().float().equal(f.values))
        for f in engine.gradients()
    ]


def kinds_of_stages(ranks):
    return {stage: kinds(ranks, stage) for stage in STAGES[1:]}


@pytest.fixture(scope="module")
def reduced():
    return run_distributed(kinds_of_stages, 2)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_each_kind_of_parameter_is_reduced_in_its_own_dtype(reduced, stage):
    """DeepSpeed's buckets once took the dtype of the first parameter."""
    found = [kind for rank in reduced for kind in rank[stage]]
    assert sum(matrix for matrix, _ in found) >= 8
    assert all(held for matrix, held in found if matrix)
    others = [held for matrix, held in found if not matrix]
    assert others and not any(others), "fp32 gradients went through fp16"


def state_of(engine):
    """This rank's pieces of weights and both moments, by parameter."""
    state = engine._engine.basic_optimizer.state
    return {piece.name: kept(piece.values, state) for piece in engine.owned()}


def kept(values, state):
    """A piece of the weights, and of both moments of the tensor that it lies in."""
    for flat, found in state.items():
        start = (values.data_ptr() - flat.data_ptr()) // flat.element_size()
        if 0 <= start < flat.numel():
            moments = (found[name].view(-1)[start:][: values.numel()] for name in MOMENT_NAMES)
            return [values.clone(), *(moment.clone() for moment in moments)]
    raise AssertionError("no tensor of the optimizer holds these weights")


def changed(before, after):
    return {n for n in before if not all(map(torch.equal, before[n], after[n]))}


def spoil(engine, name):
    """An infinity in the gradient that enters the module; returns a handle."""

    def poison(grad):
        return grad.index_fill(1, torch.tensor([3]), torch.inf)

    def hook(module, inputs, out):
        out.register_hook(poison)

    return engine.module.get_submodule(name).register_forward_hook(hook)


def overflow(ranks, stage, skip, name):
    """One good update, then one with an infinity on the last rank alone; and without it."""
    engine = build(ranks, stage, f"train.micro_batch={8 // ranks.world}", f"train.skip={skip}",
                   "train.clip=0", "train.moments=16-bit")  # fmt: skip
    backward(engine, ranks, 0)
    engine.step(1e-3)
    before, scales = state_of(engine), engine.transform.scaling.scales.values
    if ranks.rank == ranks.world - 1:
        handle = spoil(engine, name)
    backward(engine, ranks, 1)
    engine.step(1e-3, measure=True)
    if ranks.rank == ranks.world - 1:
        handle.remove()
    after = state_of(engine)
    clean = build(ranks, stage, f"train.micro_batch={8 // ranks.world}",
                  "train.clip=0", "train.moments=16-bit")  # fmt: skip
    for number in range(2):
        backward(clean, ranks, number)
        clean.step(1e-3)
    factors = np.array(engine.transform.scaling.scales.values) / np.array(scales)
    steps = {int(s["step"]) for s in engine._engine.basic_optimizer.state.values()}
    return {
        "changed": changed(before, after), "all": set(before), "skipped": engine.skipped,
        "unlike_clean": changed(after, state_of(clean)), "factors": factors,
        "overflows": engine.transform.scaling.scales.overflows, "steps": steps,
        "finite": all(v.isfinite().all() for vs in after.values() for v in vs[:1]),
    }  # fmt: skip


def overflows(ranks, skip, name):
    return {stage: overflow(ranks, stage, skip, name) for stage in STAGES}


@pytest.fixture(scope="module")
def skipped_updates():
    return run_distributed(overflows, 2, "step", "blocks.1.attention.out")


@pytest.fixture(scope="module")
def skipped_first_block():
    return run_distributed(overflows, 2, "block", "blocks.0.attention.out")


@pytest.fixture(scope="module")
def skipped_later_block():
    return run_distributed(overflows, 2, "block", "blocks.1.attention.out")


GOOD, BAD = 2 ** (1 / 1000), 2**-0.5


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_costs_the_whole_update_and_divides_one_scale(skipped_updates, stage):
    for rank in skipped_updates:
        found = rank[stage]
        assert found["skipped"] and found["changed"] == set() and found["steps"] == {1}
        assert found["factors"] == pytest.approx([GOOD, GOOD, BAD, GOOD], rel=1e-6)
        assert found["overflows"] == [0, 0, 1, 0]


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_costs_the_update_of_its_block_alone(skipped_first_block, stage):
    """The first block's: no resblock comes before it, so that all others' updates are the same."""
    for rank in skipped_first_block:
        found = rank[stage]
        inside = {n for n in found["all"] if n.startswith("blocks.0.attention.")}
        assert not found["skipped"] and found["changed"] == found["all"] - inside
        others = {n for n in found["unlike_clean"] if n.startswith("blocks.")}
        assert others == inside
        assert found["factors"] == pytest.approx([BAD, GOOD, GOOD, GOOD], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_blocks_before_the_overflow_go_on_with_finite_gradients(skipped_later_block, stage):
    for rank in skipped_later_block:
        found = rank[stage]
        after = {n for n in found["unlike_clean"] if n.startswith("blocks.1.mlp.")}
        inside = {n for n in found["all"] if n.startswith("blocks.1.attention.")}
        assert found["finite"] and after == set()
        assert found["changed"] == found["all"] - inside


def resumed(ranks, stage, folder, moments):
    overrides = f"train.micro_batch={8 // ranks.world}", f"train.moments={moments}"
    engine = build(ranks, stage, *overrides)
    for number in range(3):
        backward(engine, ranks, number)
        engine.step(1e-3)
    place = folder / f"{stage}-{moments}"
    checkpoint = checkpointed.save_engine(engine, ranks, place)
    ahead = [(backward(engine, ranks, n), engine.step(1e-3)) for n in range(3, 6)]
    again = build(ranks, stage, *overrides)
    checkpointed.load_engine(again, checkpoint)
    return ahead == [(backward(again, ranks, n), again.step(1e-3)) for n in range(3, 6)] and (
        changed(state_of(engine), state_of(again)) == set()
    )


def resumptions(ranks, folder):
    return {(s, m): resumed(ranks, s, folder, m) for s in STAGES for m in ("fp32", "16-bit")}


@pytest.mark.slow
def test_a_loaded_engine_goes_on_bit_for_bit(tmp_path):
    for rank in run_distributed(resumptions, 2, tmp_path):
        assert all(rank.values()), rank


def telemetry(ranks, stage):
    """What is logged at scales so small that a good part of the gradients is lost."""
    engine = build(ranks, stage, f"train.micro_batch={8 // ranks.world}")
    engine.transform.scaling.scales.scale_K.fill_(ranks.world * 2.0**-8)
    backward(engine, ranks, 0)
    up = [f.values for f in engine.gradients() if f.name == "blocks.1.mlp.up.weight"]
    down = [f.values for f in engine.gradients() if f.name == "blocks.1.mlp.down.weight"]
    zeros = ranks.sum([float(sum((values == 0).sum() for values in [*up, *down]))])[0]
    if stage == 0:
        zeros /= ranks.world
    engine.step(1e-3, measure=True)
    return engine.telemetry() | {"counted": zeros / (2 * 64 * 256)}


def telemetries(ranks):
    return {stage: telemetry(ranks, stage) for stage in STAGES}


@pytest.mark.slow
def test_telemetry_counts_and_does_not_depend_on_ranks_or_stage():
    alone = run_distributed(telemetries, 1)[0]
    pair = run_distributed(telemetries, 2)[1]
    for stage, found in pair.items():
        assert found["block_norm"] == pytest.approx(alone[0]["block_norm"], rel=0.02)
        if stage:  # without ZeRO the reduction is in fp32 and loses nothing more
            assert found["underflow"] == pytest.approx(pair[1]["underflow"], abs=0.02)
        assert len(found["scale"]) == 4 and found["overflows"] == [0.0] * 4
    for found in [*alone.values(), *pair.values()]:
        assert found["underflow"][3] == pytest.approx(found["counted"])
        assert min(found["block_norm"]) > 0 and found["counted"] > 0.02


def block_norms(ranks, *overrides):
    engine = build(ranks, 2, f"train.micro_batch={8 // ranks.world}", *overrides)
    backward(engine, ranks, 0)
    engine.step(1e-3, measure=True)
    return engine.telemetry()["block_norm"]


def plain_norms(ranks):
    """The same from plain fp32 gradients."""
    engine = build(ranks, 0, "train.micro_batch=8", "train.precision=fp32")
    backward(engine, ranks, 0)
    squares = np.zeros(4)
    for gradient in engine.gradients():
        if gradient.block is not None:
            squares[gradient.block] += float(gradient.values.square().sum())
    return np.sqrt(squares)


@pytest.mark.slow
@pytest.mark.parametrize("between", ["zero", "dense"])
def test_block_norms_are_those_of_the_mean_gradient_in_true_units(between):
    overrides = (f"parallel.between_nodes={between}", "parallel.local_world_size=1")
    plain = run_distributed(plain_norms, 1)[0]
    for norms in run_distributed(block_norms, 2, *overrides):
        assert norms == pytest.approx(plain, rel=0.02)


def unsent(ranks):
    """Names in the log after a good update and after one that is skipped before it is sent."""
    engine = build(ranks, 2, "train.micro_batch=4", "parallel.between_nodes=dense",
                   "parallel.local_world_size=1")  # fmt: skip
    names = []
    for number in range(2):
        backward(engine, ranks, number)
        engine.step(1e-3, measure=True)
        names.append(set(engine.telemetry()))
        if ranks.rank == 1:
            spoil(engine, "blocks.1.mlp.up")
    return names


def test_gradients_that_were_not_sent_have_no_norm():
    for good, skipped in run_distributed(unsent, 2):
        assert good - skipped == {"block_norm"} and skipped < good


def outside(ranks):
    """Two updates; in the first the last rank's loss gradient is not finite above all resblocks."""
    engine = build(ranks, 2, "train.micro_batch=4")
    if ranks.rank == 1:
        handle = spoil(engine, "norm")
    backward(engine, ranks, 0)
    engine.step(1e-3)
    if ranks.rank == 1:
        handle.remove()
    backward(engine, ranks, 1)
    engine.step(1e-3, measure=True)
    again = build(ranks, 2, "train.micro_batch=4").transform.scaling
    again.load_state_dict(engine.transform.scaling.state_dict())
    return engine.telemetry(), again.telemetry()


def sums_in_fp16(ranks):
    """Whether cuBLAS may add in fp16: before there is an engine, and with one."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    build(ranks, 1, "train.micro_batch=8")
    return before, matmul.allow_fp16_reduced_precision_reduction


def test_sums_of_fp16_products_are_fp32():
    assert run_distributed(sums_in_fp16, 1) == [(True, False)]


def test_skipped_updates_and_overflows_outside_of_resblocks_are_counted():
    for numbers, again in run_distributed(outside, 2):
        assert (numbers["skipped"], numbers["other_overflows"]) == (1, 1)
        assert numbers["overflows"] == [0] * 4 and again["other_overflows"] == 1
