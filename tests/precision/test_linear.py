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


def course(device, inputs_first, x_RI, grad_RO):
    """Output and all gradients."""
    torch.manual_seed(0)
    made = ResblockLinear(x_RI.shape[1], grad_RO.shape[1], inputs_first)
    torch.nn.init.normal_(made.weight, std=0.05)
    torch.nn.init.normal_(made.bias)
    made, x_RI = made.to(device), x_RI.detach().to(device).requires_grad_()
    out_RO = made(x_RI)
    out_RO.backward(grad_RO.to(device))
    return [t.cpu() for t in (out_RO, x_RI.grad, made.weight.grad, made.bias.grad)]


@pytest.fixture
def fp32_sums():
    """monkeypatch cannot put this flag back: to it the module has no such attribute."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = False
    yield
    matmul.allow_fp16_reduced_precision_reduction = before


@pytest.mark.gpu
@pytest.mark.usefixtures("fp32_sums")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("inputs_first", [False, True])
def test_a_gpu_computes_what_a_cpu_does(inputs_first):
    """Up to fp16's rounding, that of the bias included; the sums of the long axis are fp32."""
    x_RI, grad_RO = torch.randn(4096, 64).half(), torch.randn(4096, 96).half() / 64
    on_cpu, on_gpu = (course(device, inputs_first, x_RI, grad_RO) for device in ("cpu", "cuda"))
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    grad_RO = torch.ones(4096, 96).half()
    grad_RO[2048:] = -1  # half of the sum is 2^17, beyond fp16; the whole is zero
    weight_grad = course("cuda", inputs_first, torch.full_like(x_RI, 64), grad_RO)[2]
    assert not weight_grad.any()


def test_a_bias_gradient_beyond_fp16_is_kept():
    made = layer(False)
    made(torch.ones(100, 6).half()).backward(torch.full((100, 10), 1000.0).half())
    assert made.bias.grad.tolist() == [100_000.0] * 10
    assert made.weight.grad.isinf().all()
