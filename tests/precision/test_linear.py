"""The resblocks' linear layer: plain in its own dtype, fp16 products on fp32 parameters."""

import pytest
import torch
import torch.nn.functional as F

from dalle_dist.precision.linear import ResblockLinear


def layer(inputs_first, dtype=torch.float32):
    torch.manual_seed(0)
    made = ResblockLinear(6, 10, inputs_first)
    torch.nn.init.normal_(made.weight)
    torch.nn.init.normal_(made.bias)
    return made.to(dtype)


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_its_own_dtype_it_is_plain(inputs_first, dtype):
    made, x = layer(inputs_first, dtype), torch.randn(3, 5, 6).to(dtype)
    assert made.weight.shape == ((6, 10) if inputs_first else (10, 6))
    weight = made.weight.t() if inputs_first else made.weight
    assert made(x).equal(F.linear(x, weight, made.bias))


@pytest.mark.parametrize("inputs_first", [False, True])
def test_fp16_rounds_matrix_output_and_the_matrix_gradient_once(inputs_first):
    made = layer(inputs_first)
    x = torch.randn(3, 5, 6).half().requires_grad_()
    grad = torch.randn(3, 5, 10).half()
    out = made(x)
    out.backward(grad)
    weight = made.weight.detach().half().double()
    weight = weight.t() if inputs_first else weight
    bias, flat, rows = made.bias.detach().double(), grad.double().flatten(0, 1), x.double()
    torch.testing.assert_close(out, (rows @ weight.t() + bias).half(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(x.grad, (grad.double() @ weight).half(), rtol=1e-3, atol=1e-5)
    expected = flat.t() @ rows.flatten(0, 1).detach()
    expected = expected.t() if inputs_first else expected
    assert made.weight.grad.dtype == torch.float32
    assert made.weight.grad.half().float().equal(made.weight.grad), "not rounded to fp16"
    torch.testing.assert_close(made.weight.grad, expected.half().float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(made.bias.grad, flat.sum(0).float(), rtol=1e-6, atol=1e-6)


def test_a_bias_gradient_beyond_fp16_is_kept():
    made = layer(False)
    made(torch.ones(100, 6).half()).backward(torch.full((100, 10), 1000.0).half())
    assert made.bias.grad.tolist() == [100_000.0] * 10
    assert made.weight.grad.isinf().all()
