"""DiLoCo's outer optimizer on pieces alone; processes are the nodes."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dalle_dist.gradients.piece import Piece
from dalle_dist.optim import outer
from dalle_dist.testing import run_distributed

SIZES = (1000, 1, 2500, 37)


def pieces_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return [Piece(f"w{n}", 0, torch.randn(n, generator=generator)) for n in SIZES]


def moved(weights, node, step):
    """What the inner steps of a node do: the same in any process."""
    for piece, change in zip(weights, pieces_of(100 * node + step), strict=True):
        piece.values.add_(change.values, alpha=0.1)


def outer_sgd(dtype, **options):
    options = {"every": 3, "lr": 0.7, "momentum": 0.9} | options
    return outer.OuterSGD(dist.group.WORLD, dtype=dtype, **options)


def course(ranks, dtype, bucket, options):
    """Five outer steps."""
    outer.BUCKET = bucket
    weights, optimizer = pieces_of(0), outer_sgd(dtype, **options)
    optimizer.restart(weights)
    found = []
    for step in range(1, 6):
        moved(weights, ranks.rank, step)
        optimizer.step(weights)
        found.append([piece.values.numpy().copy() for piece in weights])
    return found


def assert_equal(found, expected, rtol=0.0, atol=0.0):
    for one, other in zip(found, expected, strict=True):
        for values, wanted in zip(one, other, strict=True):
            np.testing.assert_allclose(values, wanted, rtol=rtol, atol=atol)


def by_torch(nodes, options):
    """The same by torch.optim.SGD, in one process."""
    parameters = [torch.nn.Parameter(piece.values) for piece in pieces_of(0)]
    options = {"lr": 0.7, "momentum": 0.9} | options
    optimizer = torch.optim.SGD(parameters, nesterov=options["momentum"] > 0, **options)
    found = []
    for step in range(1, 6):
        deltas = []
        for node in range(nodes):
            weights = [Piece("", 0, p.detach().clone()) for p in parameters]
            moved(weights, node, step)
            deltas.append([p.detach() - w.values for p, w in zip(parameters, weights, strict=True)])
        for parameter, *of_nodes in zip(parameters, *deltas, strict=True):
            parameter.grad = torch.stack(of_nodes).mean(0)
        optimizer.step()
        found.append([p.detach().numpy().copy() for p in parameters])
    return found


@pytest.mark.parametrize("bucket", [1200, 2**24])
@pytest.mark.parametrize("options", [{}, {"lr": 1.0, "momentum": 0.0}])
def test_it_is_torchs_sgd_with_nesterov_momentum_on_what_nodes_have_moved(bucket, options):
    expected = by_torch(3, options)
    for found in run_distributed(course, 3, "fp32", bucket, options):
        assert_equal(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "off"), [("bf16", 2**-7), ("fp16", 2**-10), ("int8", 1 / 60)])
def test_what_is_sent_in_few_bits_is_rounded_and_all_nodes_have_the_same(dtype, off):
    """One node has moved by no more than 0.5; a mean is off by `off` of that, then by lr 1.9 of
    it at each step, and by what momentum keeps of it.
    """
    first, *others = run_distributed(course, 3, dtype, 1200, {})
    for other in others:
        assert_equal(other, first)
    exact = by_torch(3, {})
    worst = max(np.abs(a - b).max() for a, b in zip(first[0], exact[0], strict=True))
    assert 0 < worst < 0.5 * 0.7 * 1.9 * off


def counted(ranks):
    optimizer = outer_sgd("fp32")
    weights = pieces_of(0)
    optimizer.restart(weights)
    assert optimizer.settled
    due = [optimizer.count() for _ in range(3)]
    unsettled = optimizer.settled
    optimizer.step(weights)
    return due, unsettled, optimizer.settled


def test_an_outer_step_is_due_every_so_many_steps():
    assert run_distributed(counted, 1) == [([False, False, True], False, True)]
