"""PowerSGD where something is not finite, differs between nodes, or is out of range."""

import math

import pytest
import torch
from powersgd_oracle import COMPRESSED, DENSE, mean_gradient, on_ranks, shards
from powersgd_runs import ERROR_DTYPES, build, check_close, needs_minifloat

from dalle_dist.errors import ConfigError
from dalle_dist.gradients.piece import Piece
from dalle_dist.gradients.powersgd import factors, whole


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
        assert f"Q of 1.up@{rank % 2} (12, 40) differs between nodes 0 and 1" in text


def test_shards_that_differ_between_nodes_are_caught():
    for text in on_ranks(_different_q, 4, "order"):
        assert "nodes 0 and 1 hold different shards" in text


POISON = {
    "inf in a matrix": ("0.out", math.inf),
    "nan in a gain": ("0.gain", math.nan),
    "-inf in a tall matrix": ("1.tall", -math.inf),
    "overflow": ("1.up", 3e38),
}


def _poisoned(ranks, options, poison):
    """Two good steps, one with `poison` on rank 2 alone, and one more good step.

    Beside what came out and the errors afterwards: the errors that a resblock has whose step is
    frozen. Rank 2 alone adds no gradient to them, if it is one of its matrices that is poisoned.
    """
    sgd, groups = build(ranks, 2, **options)
    adds = ranks.rank != 2 or poison is None or POISON[poison][0] not in COMPRESSED
    log = []
    for step in range(4):
        compressed = shards(COMPRESSED, step, groups.node, groups.shard_rank)
        dense = shards(DENSE, step, groups.node, groups.shard_rank)
        before = {k: e.clone() for k, e in sgd.errors().items()}
        sums = {s.key: before[s.key] + s.values for s in compressed} if step else {}
        if poison is not None and step == 2 and ranks.rank == 2:
            name, value = POISON[poison]
            for shard in compressed + dense:
                if shard.name == name:
                    shard.values.view(-1)[3] = value
        outcome = sgd.reduce(compressed, dense, measure=True)
        after = {k: e.clone() for k, e in sgd.errors().items()}
        values = {s.name: s.values for s in compressed + dense}
        log.append((outcome, values, sums if adds else before, after))
    return log


@pytest.mark.parametrize("comm_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("poison", POISON)
def test_what_is_not_finite_on_one_rank_is_bad_on_all_and_touches_one_block(poison, comm_dtype):
    options = {"comm_dtype": comm_dtype}
    clean = on_ranks(_poisoned, 4, options, None)
    found = on_ranks(_poisoned, 4, options, poison)
    name, _ = POISON[poison]
    block = (COMPRESSED | DENSE)[name][0]
    of_block = {n for n, (b, _) in (COMPRESSED | DENSE).items() if b == block}
    for rank in range(4):
        outcome, values, kept, after = found[rank][2]
        clean_outcome, clean_values, _, clean_after = clean[rank][2]
        assert outcome.nonfinite == {block} and clean_outcome.nonfinite == frozenset()
        for n in COMPRESSED | DENSE:
            key = f"{n}@{rank % 2}"
            if n in of_block:
                assert not values[n].any() and outcome.square_norms[key] == math.inf
            else:
                assert torch.equal(values[n], clean_values[n])
                assert outcome.square_norms[key] == clean_outcome.square_norms[key] < math.inf
            if n in COMPRESSED:
                assert torch.equal(after[key], (kept if n in of_block else clean_after)[key])
        assert found[rank][3][0].nonfinite == frozenset()
        assert all(v.isfinite().all() for v in found[rank][3][1].values())


def _nan_in_block_1(monkeypatch):
    """In its bases, and in what is sent whole: it alone has shards of 12 rows and 40 columns."""
    basis, launch = factors.orthonormal_BMR, whole.launch_mean

    def broken_basis(p_BMR):
        found, sound_B = basis(p_BMR)
        return found * (math.nan if p_BMR.shape[1] == 12 else 1), sound_B

    def broken_launch(values, group):
        return launch(values * (math.nan if len(values) == 12 * 40 else 1), group)

    monkeypatch.setattr(factors, "orthonormal_BMR", broken_basis)
    monkeypatch.setattr(whole, "launch_mean", broken_launch)


def _late_failure(ranks, poison, options):
    """What rank 0 sends of block 1 is NaN at the third step; or its error buffer has an infinity.

    The third step is one of factors, or a dense one.
    """
    sgd, groups = build(ranks, 1, **options)
    monkeypatch = pytest.MonkeyPatch()
    for step in range(3):
        given = shards(COMPRESSED, step, groups.node)
        sums = {s.key: s.values.clone() for s in given}
        if step == 2:
            for key, total in sums.items():
                total += sgd.errors()[key]
            if poison == "sent" and ranks.rank == 0:
                _nan_in_block_1(monkeypatch)
            elif poison == "error" and ranks.rank == 0:
                sgd.errors()["1.up@0"][0, 0] = math.inf
        outcome = sgd.reduce(given)
    monkeypatch.undo()
    errors = {key: error.clone() for key, error in sgd.errors().items()}
    again = sgd.reduce(shards(COMPRESSED, 3, groups.node))
    return outcome.nonfinite, sums, errors, {s.name: s.values for s in given}, again.nonfinite


@pytest.mark.parametrize("dense_every", [0, 2], ids=["factors", "dense"])
@pytest.mark.parametrize(
    ("poison", "error_dtype"),
    [("sent", "fp32"), pytest.param("sent", "1-6-9", marks=needs_minifloat), ("error", "fp32")],
)
def test_a_failure_after_the_gradient_went_in_keeps_finite_buffers_and_zeroes_others(
    poison, error_dtype, dense_every
):
    options = {"error_dtype": error_dtype, "dense_every": dense_every}
    for rank, found in enumerate(on_ranks(_late_failure, 3, poison, options)):
        bad, sums, errors, values, again = found
        assert bad == {1} and again == frozenset()
        for key in ("1.up@0", "1.gate@0", "1.tall@0"):
            assert not values[key[:-2]].any()
            zeroed = poison == "error" and rank == 0 and key == "1.up@0"
            wanted = torch.zeros_like(sums[key]) if zeroed else sums[key]
            rounding = 0 if error_dtype == "fp32" else 2**-9
            assert torch.allclose(errors[key], wanted, rtol=rounding, atol=0)
        for key in ("0.qkv@0", "0.out@0", "head@0"):
            assert values[key[:-2]].any() and not torch.equal(errors[key], sums[key])
            assert dense_every == 0 or not errors[key].any()


def _unsound(ranks, broken):
    """Two steps; Cholesky may have given no basis of the shards of 12 rows, in the second."""
    sgd, groups = build(ranks, 1)
    basis = factors.orthonormal_BMR

    def broken_basis(p_BMR):
        found, sound_B = basis(p_BMR)
        failed = broken and p_BMR.shape[1] == 12
        return (found + 1, ~sound_B) if failed else (found, sound_B)

    for step in range(2):
        given = shards(COMPRESSED, step, groups.node)
        with pytest.MonkeyPatch.context() as patch:
            if step == 1:
                patch.setattr(factors, "orthonormal_BMR", broken_basis)
            assert not sgd.reduce(given).nonfinite
    return {shard.name: shard.values for shard in given}, sgd.state_dict()["errors"]


def test_where_cholesky_gives_no_basis_householder_does():
    (wanted, errors), (found, other_errors) = (on_ranks(_unsound, 2, b)[1] for b in (False, True))
    for name, value in wanted.items():
        check_close(found[name], value, 1e-5)
        check_close(other_errors[f"{name}@0"], errors[f"{name}@0"], 1e-5)
    assert not torch.equal(found["1.up"], wanted["1.up"]) and torch.equal(
        found["0.qkv"], wanted["0.qkv"]
    )


def _skipped(ranks, error_dtype):
    sgd, groups = build(ranks, 1, error_dtype=error_dtype)
    total = {}
    for step in range(3):
        given = shards(COMPRESSED, step, groups.node)
        sgd.reduce(given, skip=step == 1)
        if step == 1:
            assert not any(shard.values.any() for shard in given)
        for shard in given:
            total[shard.key] = total.get(shard.key, 0) + shard.values.double()
    state = sgd.state_dict()["errors"]
    return {key: value + state[key].double() for key, value in total.items()}


@pytest.mark.parametrize("error_dtype", ERROR_DTYPES)
def test_what_a_skipped_step_does_not_take_comes_with_the_next(error_dtype):
    totals = on_ranks(_skipped, 3, error_dtype)[0]
    for name in COMPRESSED:
        wanted = sum(mean_gradient(name, step, 3) for step in range(3))
        check_close(totals[f"{name}@0"], wanted, 1e-6 if error_dtype == "fp32" else 3e-3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"comm_dtype": "int8"}, "comm_dtype: 'int8' is not one of fp32, bf16, fp16, 1-6-9"),
        ({"error_dtype": "bf16"}, "error_dtype: 'bf16' is not one of fp32, 1-6-9"),
        ({"refresh_every": -1}, "refresh_every: -1 is negative"),
        ({"start_step": -1}, "start_step: -1 is negative"),
        ({"dense_every": -2}, "dense_every: -2 is negative"),
    ],
)
def test_arguments_out_of_range_are_refused(options, text):
    from dalle_dist.distributed import process_group

    with pytest.raises(ConfigError, match=text):
        build(process_group.init(), 1, **options)


def test_a_rank_without_use_is_refused_with_the_shard():
    from dalle_dist.distributed import process_group

    sgd, _ = build(process_group.init(), 1, rank=10)
    with pytest.raises(ConfigError, match=r"head@0 of shape 10x30; the largest allowed is 9"):
        sgd.reduce(shards(["head"], 0, 0))
    with pytest.raises(ValueError, match="block: 2 is not in 0 to 1"):
        sgd.reduce([Piece("w", 0, torch.zeros(20, 20), block=2)])
