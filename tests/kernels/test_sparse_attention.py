"""Every backend against a slow loop in fp64, and against plain PyTorch in its own dtype."""

import math

import pytest
import torch
from dalle_kernels.masks import MASKS, AttentionMask, variants
from dalle_kernels.sparse_attention import sparse_attention


def slow(qkv_BN3HD, mask):
    """Softmax of scores, query by query."""
    q, k, v = qkv_BN3HD.double().unbind(2)
    dense, out = mask.dense(), torch.empty_like(q)
    for n in range(mask.tokens):
        keys = dense[n]
        scores = torch.einsum("bhd,bkhd->bhk", q[:, n], k[:, keys]) / math.sqrt(q.shape[-1])
        out[:, n] = torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), v[:, keys])
    return out


def inputs(mask, dtype=torch.double, batch=2, heads=2, width=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, mask.tokens, 3, heads, width)
    return torch.randn(shape, dtype=torch.double, generator=generator).to(dtype).requires_grad_()


CPU_KINDS = [kind for kind in MASKS if kind != "causal"]


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("grid", [1, 3, 4, 8])
@pytest.mark.parametrize("kind", MASKS)
def test_equals_a_slow_loop(kind, grid, variant):
    mask = AttentionMask(kind, 5, grid, variant, kernel=5)
    qkv = inputs(mask)
    expected = slow(qkv, mask)
    (grad_expected,) = torch.autograd.grad(expected.square().sum(), qkv)
    for backend in ("reference", "cpu"):
        out = sparse_attention(qkv, mask, backend)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
        (grad,) = torch.autograd.grad(out.square().sum(), qkv)
        torch.testing.assert_close(grad, grad_expected, atol=1e-11, rtol=1e-11)


def errors(mask, dtype, backend, draws=8, **shape):
    """Largest errors of output and gradient against fp64 on the same rounded inputs.

    Over several draws: with two tokens a single one is right or wrong by luck.
    """
    found = []
    for seed in range(draws):
        qkv = inputs(mask, dtype, seed=seed, **shape)
        out = sparse_attention(qkv, mask, backend)
        (grad,) = torch.autograd.grad(out.double().square().sum(), qkv)
        rounded = qkv.detach().double().requires_grad_()
        expected = slow(rounded, mask)
        (grad_expected,) = torch.autograd.grad(expected.square().sum(), rounded)
        found.append(
            [(a - b).detach().abs().max() for a, b in ((out, expected), (grad, grad_expected))]
        )
    # A NaN is an error without bound, not one that a maximum may pass over.
    return torch.tensor(found).nan_to_num(nan=math.inf).amax(0).tolist()


@pytest.fixture
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", CPU_KINDS)
def test_cpu_backend_is_as_exact_as_plain_torch(kind, dtype):
    """At most twice the error of plain PyTorch in the same dtype, gradients three times."""
    for text, grid, batch, heads in ((1, 1, 1, 1), (5, 3, 2, 1), (8, 8, 2, 2), (20, 12, 1, 3)):
        mask = AttentionMask(kind, text, grid, kernel=5)
        ours, plain = (
            errors(mask, dtype, backend, batch=batch, heads=heads)
            for backend in ("cpu", "reference")
        )
        assert ours[0] <= 2 * plain[0], (mask, ours, plain)
        assert ours[1] <= 3 * plain[1], (mask, ours, plain)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "variant"), [*((k, "paper") for k in MASKS), ("conv", "clamp")])
def test_full_size(kind, variant, dtype):
    """The paper's 256 + 32 x 32 tokens, against the reference in fp64."""
    mask = AttentionMask(kind, 256, 32, variant)
    qkv = inputs(mask, dtype, batch=1, heads=1, width=64)
    results = {}
    for name, x, backend in (
        ("exact", qkv.detach().double().requires_grad_(), "reference"),
        ("plain", qkv, "reference"),
        ("ours", qkv, "cpu"),
    ):
        out = sparse_attention(x, mask, backend)
        results[name] = out.double(), torch.autograd.grad(out.double().square().sum(), x)[0]
    for part, limit in ((0, 2), (1, 3)):
        ours, plain = (
            (results[name][part] - results["exact"][part]).abs().max() for name in ("ours", "plain")
        )
        assert ours <= limit * plain, (part, float(ours), float(plain))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_training_goes_on_after_inference_mode(backend):
    """Masks kept from a call under inference mode once broke the next backward pass."""
    mask = AttentionMask("conv", 3, 8, kernel=7)
    qkv = inputs(mask, torch.float32)
    with torch.inference_mode():
        expected = sparse_attention(qkv, mask, backend)
    out = sparse_attention(qkv, mask, backend)
    out.sum().backward()
    assert qkv.grad.isfinite().all() and out.equal(expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_masks_made_where_meta_is_the_default_device(backend):
    mask = AttentionMask("conv", 2, 8, kernel=7)
    qkv = inputs(mask, torch.float32)
    with torch.device("meta"):
        out = sparse_attention(qkv.detach(), mask, backend)
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
