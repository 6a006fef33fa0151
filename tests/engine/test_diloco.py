"""Nodes that train apart and meet now and then, by processes as ranks."""

import contextlib
import itertools
from unittest import mock

import checkpointed
import numpy as np
import pytest
import torch
import torch.distributed as dist

from dalle_dist.gradients.piece import assemble
from dalle_dist.optim.outer import MOMENTUM
from dalle_dist.testing import run_distributed
from tests.engine.test_fp16 import changed, spoil, state_of
from tests.engine.test_nodes import BATCH, backward, build_on, digest

LR = 1e-2
SLOWLY = pytest.mark.slow
COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "_allgather_base",
    "allgather_into_tensor_coalesced", "allgather_coalesced", "reduce_scatter",
    "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base",
    "gather", "scatter", "send",
)  # fmt: skip


def size_of(value):
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(size_of, value)) if isinstance(value, (list, tuple)) else 0


@contextlib.contextmanager
def bytes_between_nodes(size):
    """A list to which the tensors of each collective call add up that more than one node is in."""
    found = []

    def counting(call):
        def counted(group, *args, **options):
            members = dist.get_process_group_ranks(group)
            if len({rank // size for rank in members}) > 1:
                found.append(size_of(args))
            return call(group, *args, **options)

        return counted

    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            call = getattr(dist.ProcessGroup, name)
            stack.enter_context(mock.patch.object(dist.ProcessGroup, name, counting(call)))
        yield found


def step_of(engine, ranks, number):
    loss = backward(engine, ranks, number, BATCH)
    sums = torch.tensor([loss / ranks.world], dtype=torch.float64)
    engine.reduce(sums)
    engine.apply(LR)
    return loss


def common_loss(engine):
    """Of what this rank's node computes with, of a batch that is the same everywhere."""
    generator = torch.Generator().manual_seed(7)
    text_BT = torch.randint(2, 50, (2, 6), generator=generator)
    codes_BN = torch.randint(0, 20, (2, 16), generator=generator)
    with torch.no_grad():
        text, _, image, *_ = engine(text_BT, codes_BN)
    return float(text), float(image)


def course(ranks, stage, precision, size):
    """Seven steps on one batch, with an outer step after every third."""
    engine = build_on(ranks, stage, "diloco", f"train.precision={precision}",
                      "parallel.outer_every=3", size=size)  # fmt: skip
    found = {"losses": [], "sent": [], "digests": [], "settled": [], "common": []}
    for _ in range(7):
        with bytes_between_nodes(size) as sent:
            found["losses"].append(step_of(engine, ranks, 0))
        found["sent"].append(sum(sent))
        found["digests"].append(digest(engine))
        found["settled"].append(engine.settled)
        found["common"].append(common_loss(engine))
    found["owned"] = sum(piece.values.numel() for piece in engine.owned())
    return found


LAYOUTS = [(2, 2, "fp32"), (2, 1, "bf16"), (3, 2, "bf16"), (1, 2, "fp32")]
REST = [each for each in itertools.product((1, 2, 3), (1, 2), ("fp32", "bf16", "fp16"))
        if each not in LAYOUTS]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "size", "precision"), [*LAYOUTS, *(pytest.param(*r, marks=SLOWLY) for r in REST)]
)
def test_nodes_meet_at_outer_steps_alone(stage, size, precision):
    ranks = run_distributed(course, 2 * size, stage, precision, size)
    for one, other in zip(ranks[:size], ranks[size:], strict=True):
        same = [a == b for a, b in zip(one["digests"], other["digests"], strict=True)]
        assert same == [False, False, True] * 2 + [False] == one["settled"]
        computed = [a == b for a, b in zip(one["common"], other["common"], strict=True)]
        assert computed == same, "the model computes with the weights of its node"
        losses = one["losses"]
        assert losses == other["losses"] and losses[-1] < 0.95 * losses[0]
    for rank in ranks:
        inner = [sent for sent, met in zip(rank["sent"], rank["settled"], strict=True) if not met]
        outer = [sent for sent, met in zip(rank["sent"], rank["settled"], strict=True) if met]
        assert max(inner) < 200, "flags of resblocks, and the loss"
        # The deltas in bf16, beside them.
        assert all(0 <= sent - 2 * rank["owned"] < 200 for sent in outer)


def plain_means(ranks, stage):
    """Weights of this rank before and after each outer step."""
    engine = build_on(ranks, stage, "diloco", "train.precision=fp32", "parallel.outer_every=1",
                      "parallel.outer_lr=1.0", "parallel.outer_momentum=0",
                      "parallel.outer_dtype=fp32")  # fmt: skip
    step, found = engine._outer.step, []

    def watched(weights):
        before = torch.cat([piece.values for piece in weights])
        step(weights)
        found.append((before.numpy(), torch.cat([piece.values for piece in weights]).numpy()))

    engine._outer.step = watched
    for number in range(3):
        step_of(engine, ranks, number)
    return found


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=SLOWLY)])
def test_at_every_step_with_lr_1_it_is_the_mean_of_the_nodes_weights(stage):
    ranks = run_distributed(plain_means, 4, stage)
    for one, other in zip(ranks[:2], ranks[2:], strict=True):
        assert len(one) == 3
        for (first, mean), (second, same) in zip(one, other, strict=True):
            assert np.array_equal(mean, same) and not np.array_equal(first, second)
            np.testing.assert_allclose(mean, (first + second) / 2, rtol=1e-6, atol=1e-7)


def overflow(ranks, precision):
    """A good step, then one with an infinity on the last rank alone."""
    engine = build_on(ranks, 2, "diloco", f"train.precision={precision}")
    step_of(engine, ranks, 0)
    before = state_of(engine)
    handle = spoil(engine, "blocks.1.attention.out") if ranks.rank == 3 else None
    step_of(engine, ranks, 1)
    if handle is not None:
        handle.remove()
    return engine.skipped, changed(before, state_of(engine))


@pytest.mark.parametrize("precision", ["fp16", pytest.param("fp32", marks=SLOWLY)])
def test_a_gradient_that_is_not_finite_on_one_node_skips_the_step_on_all(precision):
    assert run_distributed(overflow, 4, precision) == [(True, set())] * 4


def whole_momentum(engine, ranks):
    pieces = engine.transform_state()[1][MOMENTUM]
    parts = ranks.gather({piece.key: piece.values.numpy() for piece in pieces})
    found = {key: torch.from_numpy(values) for part in parts for key, values in part.items()}
    whole = assemble(found, engine.shapes)
    return torch.cat([values.view(-1) for values in whole.values()]).numpy()


def build_saved(ranks, stage, size):
    return build_on(ranks, stage, "diloco", "train.precision=fp32", "parallel.outer_every=3",
                    "parallel.outer_dtype=int8", size=size)  # fmt: skip


def saved(ranks, stage, size, folder):
    """Saved between outer steps, which brings one forward."""
    engine = build_saved(ranks, stage, size)
    for _ in range(4):
        step_of(engine, ranks, 0)
    assert not engine.settled
    place = checkpointed.save_engine(engine, ranks, folder)
    return place, whole_momentum(engine, ranks), common_loss(engine), step_of(engine, ranks, 0)


def gone_on(ranks, stage, size, place):
    engine = build_saved(ranks, stage, size)
    step_of(engine, ranks, 1)  # what it replaces is not what it starts with
    checkpointed.load_engine(engine, place)
    momentum, common = whole_momentum(engine, ranks), common_loss(engine)
    settled = engine.settled
    losses = [step_of(engine, ranks, 0) for _ in range(3)]
    return momentum, common, settled, losses, digest(engine)


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    [(2, (4, 2), (3, 1)), pytest.param(3, (4, 2), (2, 2), marks=SLOWLY),
     pytest.param(1, (2, 1), (4, 2), marks=SLOWLY)],
)  # fmt: skip
def test_saved_on_some_nodes_and_gone_on_with_on_others(tmp_path, stage, before, after):
    """`before` and `after`: ranks, and how many of them are a node."""
    wrote = run_distributed(saved, before[0], stage, before[1], tmp_path)
    place, momentum, common, loss = wrote[0]
    found = run_distributed(gone_on, after[0], stage, after[1], place)
    assert np.abs(momentum).max() > 1e-4
    for loaded, computed, settled, losses, _ in found:
        assert settled and np.array_equal(loaded, momentum)
        assert np.allclose(computed, common, rtol=1e-6)
        assert np.isclose(losses[0], loss, rtol=1e-5) and losses[-1] < losses[0]
    of_nodes = [found[first : first + after[1]] for first in range(0, after[0], after[1])]
    for node in of_nodes[1:]:
        assert [r[-1] for r in node] == [r[-1] for r in of_nodes[0]]


def first_gradients(ranks, between, precision):
    engine = build_on(ranks, 2, between, f"train.precision={precision}")
    backward(engine, ranks, 0, BATCH)
    engine.reduce()
    return torch.cat([piece.values.view(-1) for piece in engine.gradients()]).numpy()


@pytest.mark.parametrize("precision", ["fp16", pytest.param("fp32", marks=SLOWLY)])
def test_the_nodes_gradients_are_of_one_size_with_the_whole_batchs(precision):
    """train.clip then means what it means in other runs."""
    apart, dense = (run_distributed(first_gradients, 4, b, precision) for b in ("diloco", "dense"))
    assert not np.array_equal(apart[0], apart[2])
    mean = (apart[0] + apart[2]) / 2
    assert np.linalg.norm(mean - dense[0]) < 1e-3 * np.linalg.norm(dense[0])
