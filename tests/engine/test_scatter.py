"""Large gradients are reduced one by one under ZeRO-3, and come out as those that go together."""

import numpy as np
import pytest
import torch

from dalle_dist.engine.deepspeed import scatter
from dalle_dist.testing import run_distributed
from tests.engine.test_fp16 import backward, build

APART = 4096  # of the tiny model, qkv, out and the two of the MLP


def _course(ranks, large, *overrides):
    alone, plain = [], scatter._mean_of_part

    def told(whole, group):
        alone.append(whole.numel())
        return plain(whole, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter, "LARGE", large)
        patch.setattr(scatter, "_mean_of_part", told)
        engine = build(ranks, 3, *overrides)
        curve = [(backward(engine, ranks, n), engine.step(1e-3)) for n in range(3)]
    return np.array(curve), alone


def _both(ranks, precision):
    given = (f"train.precision={precision}", f"train.micro_batch={4 // ranks.world}")
    copied = "train.deepspeed={zero_optimization: {contiguous_gradients: true}}"
    return [
        _course(ranks, APART, *given),
        _course(ranks, 2**40, *given),
        _course(ranks, 2**40, *given, copied),
    ]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_gradients_alone_and_together_are_the_same(precision):
    for (apart, alone), (together, none), (copied, _) in run_distributed(_both, 2, precision):
        assert np.array_equal(apart, together) and np.array_equal(apart, copied)
        assert not none
        # 3 steps of 2 or 4 micro-batches; of 2 layers four matrices each
        assert len(alone) % 8 == 0 and min(alone) == APART and len(alone) >= 3 * 8


def _uneven(ranks):
    """A length that the ranks do not divide, and a gradient that is not contiguous."""
    reduce_scatter = scatter._apart(_together)
    values = [torch.arange(5.0) + ranks.rank, (torch.arange(6.0) * (1 + ranks.rank)).view(2, 3).t()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter, "LARGE", 5)
        return [part.tolist() for part in reduce_scatter(values)]


def _together(tensors, group=None):
    return [tensor * 100 for tensor in tensors]  # the one of 5 alone comes here


def test_what_cannot_be_cut_evenly_goes_together():
    first, second = run_distributed(_uneven, 2)
    assert first[0] == [0, 100, 200, 300, 400] and second[0] == [100, 200, 300, 400, 500]
    # Of 1.5 times [[0, 3], [1, 4], [2, 5]]
    assert first[1] == [0, 4.5, 1.5] and second[1] == [6, 3, 7.5]
