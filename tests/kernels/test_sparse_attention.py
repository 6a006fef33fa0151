"""Every backend against a slow loop in fp64, and against plain PyTorch in its own dtype."""

import math

import pytest
import torch
from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention import BACKENDS, sparse_attention

KINDS = ["row", "column", "conv", "causal"]


def slow(qkv_BN3HD, mask):
    """Softmax of scores, query by query."""
    q, k, v = qkv_BN3HD.double().unbind(2)
    dense, out = mask.dense(), torch.empty_like(q)
    for n in range(mask.tokens):
        keys = dense[n]
        scores = torch.einsum("bhd,bkhd->bhk", q[:, n], k[:, keys]) / math.sqrt(q.shape[-1])
        out[:, n] = torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), v[:, keys])
    return out


def inputs(mask, dtype=torch.double, batch=2, heads=2, width=16):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, mask.tokens, 3, heads, width)
    return torch.randn(shape, dtype=torch.double, generator=generator).to(dtype).requires_grad_()


CPU_KINDS = [kind for kind in KINDS if kind != "causal"]


@pytest.mark.parametrize("dialect", ["paper", "clamp", "torus", "dalle-pytorch"])
@pytest.mark.parametrize("grid", [1, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_slow_loop(kind, grid, dialect):
    mask = AttentionMask(kind, 5, grid, dialect, kernel=5)
    qkv = inputs(mask)
    expected = slow(qkv, mask)
    (grad_expected,) = torch.autograd.grad(expected.square().sum(), qkv)
    for backend in ["reference"] + (["cpu"] if kind in CPU_KINDS else []):
        out = sparse_attention(qkv, mask, backend)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
        (grad,) = torch.autograd.grad(out.square().sum(), qkv)
        torch.testing.assert_close(grad, grad_expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CPU_KINDS)
def test_cpu_backend_is_as_exact_as_plain_torch(kind, dtype):
    """At most twice the error of plain PyTorch in the same dtype, gradients three times."""
    mask = AttentionMask(kind, 8, 8, kernel=3)
    exact = inputs(mask, torch.double)
    errors = {}
    for backend in BACKENDS:
        qkv = inputs(mask, dtype)
        out = sparse_attention(qkv, mask, backend)
        (grad,) = torch.autograd.grad(out.double().square().sum(), qkv)
        rounded = qkv.detach().double().requires_grad_()
        expected = slow(rounded, mask)
        (grad_expected,) = torch.autograd.grad(expected.square().sum(), rounded)
        errors[backend] = (
            (out.double() - expected).abs().max().item(),
            (grad.double() - grad_expected).abs().max().item(),
        )
    assert exact.dtype == torch.double
    assert errors["cpu"][0] <= 2 * errors["reference"][0]
    assert errors["cpu"][1] <= 3 * errors["reference"][1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_goes_on_after_inference_mode(backend):
    """Masks kept from a call under inference mode once broke the next backward pass."""
    mask = AttentionMask("conv", 3, 8, kernel=7)
    qkv = inputs(mask, torch.float32)
    with torch.inference_mode():
        expected = sparse_attention(qkv, mask, backend)
    out = sparse_attention(qkv, mask, backend)
    out.sum().backward()
    assert qkv.grad.isfinite().all() and out.equal(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_made_where_meta_is_the_default_device(backend):
    mask = AttentionMask("conv", 2, 8, kernel=7)
    qkv = inputs(mask, torch.float32)
    with torch.device("meta"):
        out = sparse_attention(qkv.detach(), mask, backend)
        assert mask.image_keys(0).tolist() == [0]
    assert out.equal(sparse_attention(qkv, mask, backend))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m: sparse_attention(torch.zeros(1, m.tokens, 2, 1, 8), m), "qkv"),
        (lambda m: sparse_attention(torch.zeros(1, 7, 3, 1, 8), m), "mask"),
        (lambda m: sparse_attention(torch.zeros(1, m.tokens, 3, 1, 8), m, "fast"), "backend"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(AttentionMask("row", 4, 4))
