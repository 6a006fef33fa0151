"""PowerSGD over gloo: 2 machines x 2 ranks, 3 x 1 and 4 x 1."""

import hashlib
import importlib.util
import math

import pytest
import torch
import torch.distributed as dist
from powersgd_oracle import (
    BLOCKS,
    COMPRESSED,
    DENSE,
    RANK,
    SlowPowerSGD,
    gradient,
    mean_gradient,
    on_ranks,
    shards,
)

from dalle_dist.gradients.powersgd import factors
from dalle_dist.distributed.groups import node_groups
from dalle_dist.gradients.powersgd.algorithm import Outcome, PowerSGD
from dalle_dist.errors import CheckpointError, ConfigError

CLUSTERS = [(4, 2), (3, 1), (4, 1)]
needs_minifloat = pytest.mark.skipif(
    importlib.util.find_spec("dalle_kernels.minifloat") is None,
    reason="needs the minifloat package",
)
WIRES = ["fp32", "bf16", "fp16", pytest.param("1-6-9", marks=needs_minifloat)]
STORED = ["fp32", pytest.param("1-6-9", marks=needs_minifloat)]


def build(ranks, local_world_size, **options):
    groups = node_groups(ranks, local_world_size)
    options = {"rank": RANK, "blocks": BLOCKS} | options
    return PowerSGD(groups.replica, flag_group=dist.group.WORLD, **options), groups


def run(ranks, local_world_size, options, steps, state=None, first=0):
    """Outputs of each step by name, the state, and what the last step said."""
    sgd, groups = build(ranks, local_world_size, **options)
    if state is not None:
        sgd.load(state[groups.shard_rank])
    outputs = []
    for step in range(first, first + steps):
        compressed = shards(COMPRESSED, step, groups.node, groups.shard_rank)
        dense = shards(DENSE, step, groups.node, groups.shard_rank)
        outcome = sgd.reduce(compressed, dense, measure=step == first + steps - 1)
        outputs.append({s.name: s.values for s in compressed + dense})
    return outputs, sgd.state(), outcome


def check_close(found, wanted, bound):
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error <= bound, f"relative error {error:.2g}"


def digest(outputs):
    parts = [v.numpy().tobytes() for step in outputs for v in step.values()]
    return hashlib.blake2b(b"".join(parts)).hexdigest()


@pytest.mark.parametrize(("world", "local_world_size"), CLUSTERS)
def test_full_rank_is_the_dense_mean(world, local_world_size):
    found = on_ranks(run, world, local_world_size, {"rank": None}, 2)
    for rank, (outputs, state, _) in enumerate(found):
        for step, output in enumerate(outputs):
            for name in COMPRESSED | DENSE:
                wanted = mean_gradient(
                    name, step, world // local_world_size, rank % local_world_size
                )
                check_close(output[name], wanted, 3e-6)
        for name, error in state["errors"].items():
            assert error.norm() < 2e-5, name


@pytest.mark.parametrize(("world", "local_world_size"), CLUSTERS)
def test_outputs_are_those_of_the_slow_simulation(world, local_world_size):
    found = on_ranks(run, world, local_world_size, {"seed": 5}, 4)
    replicas = world // local_world_size
    for rank, (outputs, state, outcome) in enumerate(found):
        local = rank % local_world_size
        slow = SlowPowerSGD(RANK, seed=5, local=local)
        for step, output in enumerate(outputs):
            for name in COMPRESSED:
                given = [gradient(name, step, i, local).double() for i in range(replicas)]
                wanted = slow.reduce(name, given)
                check_close(output[name], wanted, 2e-5)
            for name in DENSE:
                check_close(output[name], mean_gradient(name, step, replicas, local), 1e-6)
        for name in COMPRESSED:
            check_close(state["errors"][f"{name}@{local}"], slow.mean_error(name), 2e-5)
        for name, value in outputs[-1].items():
            norm = float(value.double().square().sum())
            assert outcome.square_norms[f"{name}@{local}"] == pytest.approx(norm, rel=1e-5)
        total = sum(float(value.double().square().sum()) for value in outputs[-1].values())
        assert outcome.square_norm == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    "options",
    [{}, {"warm_start": True}, {"start_step": 2}, {"dense_every": 3}],
    ids=["plain", "warm", "start", "dense"],
)
def test_nothing_is_lost_it_only_comes_later(wire, stored, options):
    """Sum of outputs + mean error = sum of true means, whatever P and Q became on the wire."""
    steps = 6
    options = {"wire": wire, "stored": stored, "q_scale": 0.25, "p_scale": 0.125} | options
    found = on_ranks(run, 3, 1, options, steps)
    for outputs, state, _ in found:
        for name in COMPRESSED:
            total = sum(output[name].double() for output in outputs)
            total += state["errors"][f"{name}@0"].double()
            wanted = sum(mean_gradient(name, step, 3) for step in range(steps))
            # Each step rounds the 1-6-9 buffer to 10 bits, at random.
            check_close(total, wanted, 1e-6 if stored == "fp32" else 3e-3)
    assert len({digest(outputs) for outputs, _, _ in found}) == 1


@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.parametrize(
    ("wire", "bound"),
    [("bf16", 3e-2), ("fp16", 4e-3), pytest.param("1-6-9", 6e-3, marks=needs_minifloat)],
)
def test_wire_formats_change_outputs_by_their_rounding(wire, bound, warm_start):
    options = {"p_scale": 2.0**-3, "q_scale": 2.0**-2, "warm_start": warm_start}
    exact = on_ranks(run, 3, 1, {"warm_start": warm_start}, 2)[0]
    found = on_ranks(run, 3, 1, options | {"wire": wire}, 2)[0]
    for step, output in enumerate(found[0]):
        for name in COMPRESSED:
            check_close(output[name], exact[0][step][name], bound)
        assert not torch.equal(output["0.qkv"], exact[0][step]["0.qkv"])
    assert found[2].sent_bytes < exact[2].sent_bytes


def test_bytes_are_those_of_p_and_q():
    outcome = on_ranks(run, 2, 1, {"wire": "bf16"}, 1)[0][2]
    factors_ = sum((m + n) * RANK for _, (m, n) in COMPRESSED.values())
    matrices = sum(m * n for _, (m, n) in COMPRESSED.values())
    assert outcome.sent_bytes == 2 * factors_ + 4 * 100
    assert outcome.dense_bytes == 2 * matrices + 4 * 100


def _low_rank(ranks):
    sgd, groups = build(ranks, 1, rank=8)
    generator = torch.Generator().manual_seed(groups.node)
    thin = torch.randn(24, 2, generator=generator), torch.randn(2, 40, generator=generator)
    given = thin[0] @ thin[1]
    mean = given.clone()
    dist.all_reduce(mean)
    outcome = sgd.reduce([Shard("w", given, 0)], measure=True)
    return given, mean / ranks.world, outcome


def test_gradients_of_lower_rank_come_through_whole():
    for given, mean, outcome in on_ranks(_low_rank, 3):
        check_close(given, mean, 5e-6)
        assert outcome.relative_errors["w@0"] < 1e-5


def _three_steps_of_one_gradient(ranks, warm_start):
    sgd, _ = build(ranks, 1, warm_start=warm_start)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
    given = torch.randn(24, 40, generator=generator) * 0.75 ** torch.arange(40.0) @ basis
    for _ in range(3):
        values = given.clone()
        sgd.reduce([Shard("w", values, 0)])
        sgd._held.errors["w@0"].clear()
    return float((values - given).norm() / given.norm())


def test_a_warm_start_finds_the_large_directions():
    """By power iteration: without new errors, the best rank-R approximation comes near."""
    cold = on_ranks(_three_steps_of_one_gradient, 2, False)[0]
    warm = on_ranks(_three_steps_of_one_gradient, 2, True)[0]
    assert warm < 0.9 * cold


def test_steps_before_the_start_and_dense_steps_are_the_mean_and_leave_no_error():
    for options, dense_steps in (({"start_step": 2}, {0, 1}), ({"dense_every": 2}, {0, 2})):
        for steps in (1, 2, 3):
            outputs, state, outcome = on_ranks(run, 3, 1, options, steps)[1]
            exact = steps - 1 in dense_steps
            errors = [float(error.norm()) for error in state["errors"].values()]
            assert exact == (max(errors) == 0)
            assert exact == (outcome.sent_bytes == outcome.dense_bytes)
            if exact and "start_step" in options:
                check_close(outputs[-1]["1.tall"], mean_gradient("1.tall", steps - 1, 3), 1e-6)
            assert set(outcome.relative_errors) == {f"{name}@0" for name in COMPRESSED}
            assert exact == (max(outcome.relative_errors.values()) == 0)


def _measured(ranks):
    sgd, groups = build(ranks, 1)
    for step in range(3):
        given = shards(COMPRESSED, step, groups.node)
        outcome = sgd.reduce(given, measure=True)
    left = sgd.state()["errors"]
    return {
        s.key: (
            outcome.relative_errors[s.key],
            float(left[s.key].norm() / (left[s.key] + s.values).norm()),
        )
        for s in given
    }


def test_relative_error_is_that_of_the_mean_within_a_tenth():
    for estimates in on_ranks(_measured, 3):
        for estimate, true in estimates.values():
            assert estimate == pytest.approx(true, rel=0.1)
            assert 0.3 < true < 1


def _different_q(ranks, what):
    seed = ranks.rank // 2 if what == "seed" else 0
    sgd, groups = build(ranks, 2, seed=seed)
    names = list(COMPRESSED)
    if what == "order" and groups.node == 1:
        names.reverse()
    with pytest.raises(ConfigError) as caught:
        sgd.reduce(shards(names, 0, groups.node, groups.shard_rank))
    return str(caught.value)


def test_a_q_that_differs_between_nodes_is_caught():
    for rank, text in enumerate(on_ranks(_different_q, 4, "seed")):
        assert f"Q of head@{rank % 2} (10, 30) differs between machines 0 and 1" in text


def test_shards_that_differ_between_nodes_are_caught():
    for text in on_ranks(_different_q, 4, "order"):
        assert "machines 0 and 1 hold different shards" in text


POISON = {
    "inf in a matrix": ("0.out", math.inf),
    "nan in a gain": ("0.gain", math.nan),
    "-inf in a tall matrix": ("1.tall", -math.inf),
    "overflow": ("1.up", 3e38),
    "the caller's word": (None, 0.0),
}


def _poisoned(ranks, options, poison):
    """Two good steps, one with `poison` on rank 2 alone, and one more good step."""
    sgd, groups = build(ranks, 2, **options)
    log = []
    for step in range(4):
        compressed = shards(COMPRESSED, step, groups.node, groups.shard_rank)
        dense = shards(DENSE, step, groups.node, groups.shard_rank)
        before = {k: e.read().clone() for k, e in sgd._held.errors.items()}
        bad = []
        if poison is not None and step == 2 and ranks.rank == 2:
            name, value = POISON[poison]
            bad = [1] if name is None else []
            for shard in compressed + dense:
                if shard.name == name:
                    shard.values.view(-1)[3] = value
        outcome = sgd.reduce(compressed, dense, bad=bad)
        after = {k: e.read().clone() for k, e in sgd._held.errors.items()}
        log.append((outcome, {s.name: s.values for s in compressed + dense}, before, after))
    return log


@pytest.mark.parametrize("wire", ["fp32", "fp16"])
@pytest.mark.parametrize("poison", POISON)
def test_what_is_not_finite_on_one_rank_is_bad_on_all_and_touches_one_block(poison, wire):
    options = {"wire": wire}
    clean = on_ranks(_poisoned, 4, options, None)
    found = on_ranks(_poisoned, 4, options, poison)
    name, _ = POISON[poison]
    block = 1 if name is None else (COMPRESSED | DENSE)[name][0]
    of_block = {n for n, (b, _) in (COMPRESSED | DENSE).items() if b == block}
    for rank in range(4):
        outcome, values, before, after = found[rank][2]
        clean_outcome, clean_values, _, clean_after = clean[rank][2]
        assert outcome.bad == {block} and clean_outcome.bad == frozenset()
        assert outcome.square_norm == math.inf
        for n in COMPRESSED | DENSE:
            key = f"{n}@{rank % 2}"
            if n in of_block:
                assert not values[n].any() and outcome.square_norms[key] == math.inf
            else:
                assert torch.equal(values[n], clean_values[n])
                assert outcome.square_norms[key] == clean_outcome.square_norms[key] < math.inf
            if n in COMPRESSED:
                kept = before if n in of_block else clean_after
                assert torch.equal(after[key], kept[key])
        assert found[rank][3][0].bad == frozenset()
        assert all(v.isfinite().all() for v in found[rank][3][1].values())


def test_a_bad_block_without_shards_on_this_rank_makes_the_norm_infinite_too():
    assert Outcome(frozenset({1}), {"w@0": 4.0}, 0, 0, {}).square_norm == math.inf
    assert Outcome(frozenset(), {"w@0": 4.0, "b@0": 1.0}, 0, 0, {}).square_norm == 5


def _nan_in_block_1(launch):
    """The only block of three shards."""
    return lambda sums: launch([s * (math.nan if len(sums) == 3 else 1) for s in sums])


def _late_failure(ranks, poison, options):
    """What rank 0 sends of block 1 is NaN at the third step; or its error buffer has an infinity.

    The third step is one of factors, or a dense one.
    """
    sgd, groups = build(ranks, 1, **options)
    right, whole = factors.orthonormal_BMR, sgd._launch_whole
    for step in range(3):
        given = shards(COMPRESSED, step, groups.node)
        sums = {s.key: s.values.clone() for s in given}
        if step == 2:
            for key, total in sums.items():
                total += sgd._held.errors[key].read()
            if poison == "sent" and ranks.rank == 0:
                factors.orthonormal_BMR = lambda p: right(p) * (math.nan if len(p) == 2 else 1)
                sgd._launch_whole = _nan_in_block_1(whole)
            elif poison == "error" and ranks.rank == 0:
                sgd._held.errors["1.up@0"].read()[0, 0] = math.inf
        outcome = sgd.reduce(given)
    factors.orthonormal_BMR, sgd._launch_whole = right, whole
    errors = {key: buffer.read().clone() for key, buffer in sgd._held.errors.items()}
    again = sgd.reduce(shards(COMPRESSED, 3, groups.node))
    return outcome.bad, sums, errors, {s.name: s.values for s in given}, again.bad


@pytest.mark.parametrize("dense_every", [0, 2], ids=["factors", "dense"])
@pytest.mark.parametrize(
    ("poison", "stored"),
    [("sent", "fp32"), pytest.param("sent", "1-6-9", marks=needs_minifloat), ("error", "fp32")],
)
def test_a_failure_after_the_gradient_went_in_keeps_finite_buffers_and_zeroes_others(
    poison, stored, dense_every
):
    options = {"stored": stored, "dense_every": dense_every}
    for rank, found in enumerate(on_ranks(_late_failure, 3, poison, options)):
        bad, sums, errors, values, again = found
        assert bad == {1} and again == frozenset()
        for key in ("1.up@0", "1.gate@0", "1.tall@0"):
            assert not values[key[:-2]].any()
            zeroed = poison == "error" and rank == 0 and key == "1.up@0"
            wanted = torch.zeros_like(sums[key]) if zeroed else sums[key]
            rounding = 0 if stored == "fp32" else 2**-9
            assert torch.allclose(errors[key], wanted, rtol=rounding, atol=0)
        for key in ("0.qkv@0", "0.out@0", "head@0"):
            assert values[key[:-2]].any() and not torch.equal(errors[key], sums[key])
            assert dense_every == 0 or not errors[key].any()


@pytest.mark.parametrize("warm_start", [False, True])
def test_saved_on_three_machines_it_goes_on_with_two_as_on_paper(warm_start):
    options = {"seed": 3, "warm_start": warm_start}
    saved = on_ranks(run, 3, 1, options, 3)
    states = [state for _, state, _ in saved]
    for other in states[1:]:
        assert all(torch.equal(other["errors"][k], e) for k, e in states[0]["errors"].items())
    # The seed comes with the state: the one given here must not matter.
    resumed = on_ranks(run, 2, 1, options | {"seed": 4}, 3, states[:1], 3)
    if warm_start:
        cold = on_ranks(run, 2, 1, {"seed": 3}, 1, states[:1], 3)
        assert digest(cold[0][0][:1]) != digest(resumed[0][0][:1])
        return
    slow = SlowPowerSGD(RANK, seed=3)
    for step in range(6):
        if step == 3:
            slow.resume(2)
        replicas = 3 if step < 3 else 2
        for name in COMPRESSED:
            wanted = slow.reduce(name, [gradient(name, step, i).double() for i in range(replicas)])
            if step >= 3:
                check_close(resumed[1][0][step - 3][name], wanted, 2e-5)
    assert resumed[0][1]["step"] == 6


def _state_before_use(ranks, state):
    sgd, _ = build(ranks, 1)
    sgd.load(state)
    return sgd.state()


def test_a_state_that_was_loaded_and_not_used_is_saved_again_as_it_was():
    state = on_ranks(run, 2, 1, {}, 2)[0][1]
    again = on_ranks(_state_before_use, 2, state)[0]
    assert again["step"] == 2 and again["errors"].keys() == state["errors"].keys()
    assert all(torch.equal(again["errors"][k], e) for k, e in state["errors"].items())


def _saved_before_use(ranks, options):
    """Outputs of one that goes on from another's state, which was never used."""
    state = build(ranks, 1, **options)[0].state()
    assert state["step"] == 0 and not state["errors"]
    # The seed comes with the state: the one given here must not matter.
    return run(ranks, 1, options | {"seed": 4}, 2, [state])


@pytest.mark.parametrize("warm_start", [False, True])
def test_saved_before_use_and_then_reduced_it_is_as_if_it_were_new(warm_start):
    options = {"seed": 3, "warm_start": warm_start}
    wanted, _, _ = on_ranks(run, 2, 1, options, 2)[0]
    for outputs, state, _ in on_ranks(_saved_before_use, 2, options):
        assert digest(outputs) == digest(wanted) and state["step"] == 2


def _load_misfit(ranks, state):
    sgd, groups = build(ranks, 1)
    sgd.load(state)
    with pytest.raises(CheckpointError) as caught:
        sgd.reduce(shards(COMPRESSED, 0, groups.node))
    return str(caught.value)


def test_states_of_other_shards_are_refused():
    state = on_ranks(run, 1, 1, {}, 1)[0][1]
    errors = dict(state["errors"])
    errors["0.out@7"] = errors.pop("0.out@0")
    for text in on_ranks(_load_misfit, 2, state | {"errors": errors}):
        assert "0.out@0 is only in one of both" in text
    for text in on_ranks(_load_misfit, 2, state | {"errors": {}}):
        assert "0.out@0 is only in one of both" in text, "used, and its errors are gone"
    errors = state["errors"] | {"0.out@0": torch.zeros(8, 16)}
    for text in on_ranks(_load_misfit, 2, state | {"errors": errors}):
        assert "error of 0.out@0 is (8, 16), the shard is (16, 16)" in text


def _undone(ranks, stored):
    sgd, groups = build(ranks, 1, stored=stored)
    total = {}
    for step in range(3):
        given = shards(COMPRESSED, step, groups.node)
        sgd.reduce(given)
        if step == 1:
            sgd.undo(given)
            continue
        for shard in given:
            total[shard.key] = total.get(shard.key, 0) + shard.values.double()
    state = sgd.state()["errors"]
    return {key: value + state[key].double() for key, value in total.items()}


@pytest.mark.parametrize("stored", STORED)
def test_an_undone_reduce_comes_with_the_next(stored):
    totals = on_ranks(_undone, 3, stored)[0]
    for name in COMPRESSED:
        wanted = sum(mean_gradient(name, step, 3) for step in range(3))
        check_close(totals[f"{name}@0"], wanted, 1e-6 if stored == "fp32" else 3e-3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"wire": "int8"}, "wire: 'int8' is not one of fp32, bf16, fp16, 1-6-9"),
        ({"stored": "bf16"}, "stored: 'bf16' is not one of fp32, 1-6-9"),
        ({"start_step": -1}, "start_step: -1 is negative"),
        ({"dense_every": -2}, "dense_every: -2 is negative"),
    ],
)
def test_arguments_out_of_range_are_refused(options, text):
    from dalle_dist.distributed import launch

    with pytest.raises(ConfigError, match=text):
        build(launch.init(), 1, **options)


def test_a_rank_without_use_is_refused_with_the_shard():
    from dalle_dist.distributed import launch

    sgd, _ = build(launch.init(), 1, rank=10)
    with pytest.raises(ConfigError, match=r"head@0 of shape 10x30; the largest allowed is 9"):
        sgd.reduce(shards(["head"], 0, 0))
    with pytest.raises(ValueError, match="block: 2 is not in 0 to 1"):
        sgd.reduce([Shard("w", torch.zeros(20, 20), block=2)])
