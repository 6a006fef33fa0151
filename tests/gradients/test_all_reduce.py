import importlib.util
import math

import pytest
import torch
import torch.distributed as dist
from powersgd_oracle import on_ranks

from dalle_dist.gradients import int8
from dalle_dist.gradients.all_reduce import bytes_per_value, launch_mean
from dalle_dist.gradients.powersgd.factored import columns_like_gaussian

needs_minifloat = pytest.mark.skipif(
    importlib.util.find_spec("dalle_kernels.minifloat") is None,
    reason="needs the minifloat package",
)
CODED = pytest.param("1-6-9", 2.0**-10, 15.984375, marks=needs_minifloat)
# Name, half a unit in the last place, largest value.
INT8 = ("int8", 1 / 254, 0)  # of its largest value, which is none of its own
ROUNDED = [("bf16", 2.0**-9, torch.finfo(torch.bfloat16).max), ("fp16", 2.0**-11, 65504.0), CODED]


def _means(ranks, wire, scale, length):
    """Two at once, advanced in turn, waited for in turn."""
    given = [torch.randn(length, generator=torch.Generator().manual_seed(s)) for s in range(8)]
    mine = [given[ranks.rank].clone(), 3 * given[ranks.rank]]
    pending = [launch_mean(values, dist.group.WORLD, wire, scale) for values in mine]
    for mean in pending:
        mean.advance()
    exact = scale * torch.stack(given[: ranks.world]).double().mean(0)
    return [mean.wait() for mean in pending], [exact, 3 * exact]


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("wire", "ulp", "_"), [("fp32", 2.0**-24, 0), INT8, *ROUNDED])
def test_mean_is_that_of_the_scaled_values_and_the_same_on_all_ranks(world, length, wire, ulp, _):
    found = on_ranks(_means, world, wire, 0.25, length)
    for means, exact in found:
        for mean, wanted, first in zip(means, exact, found[0][0], strict=True):
            # The values are below 4 x 3 x 0.25 before they cancel in the mean, and round twice or,
            # in a sum, once per rank.
            torch.testing.assert_close(mean.double(), wanted, rtol=0, atol=(world + 1) * 3 * ulp)
            assert torch.equal(mean, first)


def _extremes(ranks, wire):
    values = torch.tensor([math.inf, -math.inf, math.nan, 1e38, -1e38, 1.0])
    return launch_mean(values, dist.group.WORLD, wire).wait()


@pytest.mark.parametrize(("wire", "_", "largest"), ROUNDED)
def test_what_is_not_finite_is_bounded(wire, _, largest):
    for mean in on_ranks(_extremes, 3, wire):
        assert mean.isfinite().all() and mean[2] == 0
        if wire != "bf16":
            bound = torch.tensor([largest, -largest, largest, -largest])
            torch.testing.assert_close(mean[[0, 1, 3, 4]], bound, rtol=2e-3, atol=0)
        assert abs(mean[5] - 1) < 0.01


def test_int8_has_a_scale_for_every_1024_values():
    values = torch.cat([torch.linspace(-3, 2, 1024), 1e-6 * torch.randn(1024), torch.zeros(1024)])
    codes = int8.encode(values)
    assert codes.dtype == torch.uint8 and codes.numel() == 3 * 1028
    found = int8.decode(codes)
    for chunk, of_it in zip(values.split(1024), found.split(1024), strict=True):
        largest = chunk.abs().max()
        assert (chunk - of_it).abs().max() <= largest / 253
        assert torch.isclose(of_it.abs().max(), largest)


def test_bytes_of_a_value():
    names = ("fp32", "bf16", "fp16", "1-6-9", "int8")
    assert [bytes_per_value(name) for name in names] == [4, 2, 2, 2, 1]


def test_a_warm_query_has_the_size_of_a_gaussian_however_small_the_gradient():
    q_RN = columns_like_gaussian(torch.tensor([[3e-20, 0.0, 4e-20, 0.0], [0.0] * 4]))
    torch.testing.assert_close(q_RN, torch.tensor([[1.2, 0.0, 1.6, 0.0], [0.0] * 4]))
