"""Triton's filters and scales under the interpreter; run by test_scaled_gradients.py, which sets
it up."""

import pytest
import torch
from dalle_kernels.scaled_gradients import api
from test_scaled_gradients import CALLS, LAYOUTS, SCALES, bits, numbers
from torch import nn

from dalle_dist.precision.scaled_branch import scaled_branch
from dalle_dist.precision.scales import BlockScale, BlockScales

# numpy, which stands in for the GPU, says so when it makes a NaN or an infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EACH_CALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def assert_same_by_both(call, grad, scale):
    found, expected = (call(grad, torch.tensor(scale), by) for by in ("triton", "torch"))
    assert found.dtype == expected.dtype and found.is_contiguous()
    assert bits(found).equal(bits(expected))


@EACH_CALL
@LAYOUTS
def test_layouts(grad, call):
    assert_same_by_both(call, grad, 8200.3)


@EACH_CALL
@pytest.mark.parametrize("scale", SCALES)
def test_scales(scale, call):
    assert_same_by_both(call, numbers(40, 101, seed=1), scale)


def test_a_branch_gives_the_same_gradients(monkeypatch):
    """Its backward pass through both kernels; rows overflow where a gradient is not small."""
    grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(2)) * 2.0**-10
    grad[3], grad[5, 7] = numbers(24), torch.nan
    scales, found, launched = BlockScales(3, 1), [], []
    for triton in (True, False):
        monkeypatch.setattr(api, "use_triton", lambda *_, by=triton: launched.append(by) or by)
        x, norm = torch.linspace(-1, 1, 16 * 24).view(16, 24).requires_grad_(), nn.LayerNorm(24)
        scaled_branch(x, norm, torch.tanh, BlockScale(scales, 1, torch.float16)).backward(grad)
        found.append((bits(x.grad), bits(norm.weight.grad)))
    assert launched == [True, True, False, False]
    assert [row.any().item() for row in found[0][0]] == [row != 3 for row in range(16)]
    assert all(one.equal(other) for one, other in zip(*found, strict=True))
