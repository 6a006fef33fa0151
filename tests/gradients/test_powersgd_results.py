"""What PowerSGD gives: 2 nodes x 2 ranks, 3 x 1 and 4 x 1, over gloo."""

import pytest
import torch
import torch.distributed as dist
from powersgd_oracle import (
    COMPRESSED,
    DENSE,
    RANK,
    SlowPowerSGD,
    gradient,
    mean_gradient,
    on_ranks,
    shards,
)
from powersgd_runs import (
    CLUSTERS,
    COMM_DTYPES,
    ERROR_DTYPES,
    build,
    check_close,
    digest,
    needs_minifloat,
    run,
)

from dalle_dist.gradients.piece import Piece


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


@pytest.mark.parametrize("comm_dtype", COMM_DTYPES)
@pytest.mark.parametrize("error_dtype", ERROR_DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"warm_start": True}, {"refresh_every": 2}, {"start_step": 2}, {"dense_every": 3}],
    ids=["plain", "warm", "refresh", "start", "dense"],
)
def test_nothing_is_lost_it_only_comes_later(comm_dtype, error_dtype, options):
    """Sum of outputs + mean error = sum of true means, whatever P and Q became on the wire."""
    steps = 6
    options = {
        "comm_dtype": comm_dtype,
        "error_dtype": error_dtype,
        "q_scale": 0.25,
        "p_scale": 0.125,
    } | options
    found = on_ranks(run, 3, 1, options, steps)
    for outputs, state, _ in found:
        for name in COMPRESSED:
            total = sum(output[name].double() for output in outputs)
            total += state["errors"][f"{name}@0"].double()
            wanted = sum(mean_gradient(name, step, 3) for step in range(steps))
            # Each step rounds the 1-6-9 buffer to 10 bits, at random.
            check_close(total, wanted, 1e-6 if error_dtype == "fp32" else 3e-3)
    assert len({digest(outputs) for outputs, _, _ in found}) == 1


@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.parametrize(
    ("comm_dtype", "bound"),
    [("bf16", 3e-2), ("fp16", 4e-3), pytest.param("1-6-9", 6e-3, marks=needs_minifloat)],
)
def test_communication_dtypes_change_outputs_by_their_rounding(comm_dtype, bound, warm_start):
    options = {"p_scale": 2.0**-3, "q_scale": 2.0**-2, "warm_start": warm_start}
    exact = on_ranks(run, 3, 1, {"warm_start": warm_start}, 2)[0]
    found = on_ranks(run, 3, 1, options | {"comm_dtype": comm_dtype}, 2)[0]
    for step, output in enumerate(found[0]):
        for name in COMPRESSED:
            check_close(output[name], exact[0][step][name], bound)
        assert not torch.equal(output["0.qkv"], exact[0][step]["0.qkv"])
    assert found[2].sent_bytes < exact[2].sent_bytes


def test_bytes_are_those_of_p_and_q():
    outcome = on_ranks(run, 2, 1, {"comm_dtype": "bf16"}, 1)[0][2]
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
    outcome = sgd.reduce([Piece("w", 0, given, 0)], measure=True)
    return given, mean / ranks.world, outcome


def test_gradients_of_lower_rank_come_through_whole():
    for given, mean, outcome in on_ranks(_low_rank, 3):
        check_close(given, mean, 5e-6)
        assert outcome.relative_errors["w@0"] < 1e-5


def _three_steps_of_one_gradient(ranks, options):
    sgd, _ = build(ranks, 1, **options)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
    given = torch.randn(24, 40, generator=generator) * 0.75 ** torch.arange(40.0) @ basis
    for _ in range(3):
        values = given.clone()
        sgd.reduce([Piece("w", 0, values, 0)])
        sgd.errors()["w@0"].zero_()
    return float((values - given).norm() / given.norm())


@pytest.mark.parametrize("options", [{"warm_start": True}, {"refresh_every": 2}])
def test_a_warm_start_and_a_refresh_find_the_large_directions(options):
    """By power iteration: without new errors, the best rank-R approximation comes near."""
    cold = on_ranks(_three_steps_of_one_gradient, 2, {"refresh_every": 3})[0]
    warm = on_ranks(_three_steps_of_one_gradient, 2, options)[0]
    assert cold == on_ranks(_three_steps_of_one_gradient, 2, {})[0], "no step of three is refreshed"
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
    left = sgd.state_dict()["errors"]
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
