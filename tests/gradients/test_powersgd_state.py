"""PowerSGD's state: saved, loaded on other numbers of nodes, refused where it does not fit."""

import pytest
import torch
from powersgd_oracle import COMPRESSED, RANK, SlowPowerSGD, gradient, on_ranks, shards
from powersgd_runs import build, check_close, digest, run

from dalle_dist.errors import CheckpointError


@pytest.mark.parametrize("warm_start", [False, True])
def test_saved_on_three_nodes_it_goes_on_with_two_as_on_paper(warm_start):
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


def _in_two_parts(ranks, options):
    """Digests of steps 3 and 4: of a run of five, and of one that goes on after three."""
    whole, _, _ = run(ranks, 1, options, 5)
    _, state, _ = run(ranks, 1, options, 3)
    rest, _, _ = run(ranks, 1, options, 2, [state], 3)
    return digest(whole[3:]), digest(rest)


@pytest.mark.parametrize("options", [{}, {"warm_start": True}, {"refresh_every": 2}])
def test_alone_it_goes_on_bit_for_bit(options):
    """On several nodes their errors differ, and become the mean; refreshes fall after 2 and 4."""
    whole, rest = on_ranks(_in_two_parts, 1, options)[0]
    assert whole == rest


def _state_before_use(ranks, state):
    sgd, _ = build(ranks, 1)
    sgd.load_state_dict(state)
    return sgd.state_dict()


def test_a_state_that_was_loaded_and_not_used_is_saved_again_as_it_was():
    state = on_ranks(run, 2, 1, {}, 2)[0][1]
    again = on_ranks(_state_before_use, 2, state)[0]
    assert again["step"] == 2 and again["errors"].keys() == state["errors"].keys()
    assert all(torch.equal(again["errors"][k], e) for k, e in state["errors"].items())


def _saved_before_use(ranks, options):
    """Outputs of one that goes on from another's state, which was never used."""
    state = build(ranks, 1, **options)[0].state_dict()
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
    sgd.load_state_dict(state)
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
