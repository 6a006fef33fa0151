"""Full size on a device: exactness in 16 bits, equal bits, and memory errors."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention import sparse_attention
from decoding import decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
MASKS = [
    AttentionMask("row", 256, 32),
    AttentionMask("column", 256, 32),
    AttentionMask("conv", 256, 32),
    AttentionMask("conv", 256, 32, "clamp"),
    AttentionMask("row", 77, 19),
    AttentionMask("conv", 1, 5, kernel=3),
]
FOLDER = Path(__file__).parent  # where decoding.py is
SANITIZED = """
import torch
from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention import sparse_attention
from decoding import decode
from torch.nn.attention import SDPBackend, sdpa_kernel
for kind in ("row", "column", "conv"):
    mask = AttentionMask(kind, 37, 11, kernel=3)
    qkv = torch.randn(1, mask.tokens, 3, 2, 64, device="cuda", dtype=torch.float16)
    sparse_attention(qkv.requires_grad_(), mask, "triton").sum().backward()
    with sdpa_kernel(SDPBackend.MATH):  # of what ours is compared with: cuDNN's kernel has races
        decode(mask, [1, 3], torch.float16, "triton", device="cuda")
torch.cuda.synchronize()
"""


def run(qkv, mask, backend):
    qkv = qkv.detach().requires_grad_()
    out = sparse_attention(qkv, mask, backend)
    (grad,) = torch.autograd.grad(out.double().square().sum(), qkv)
    return out.detach().double(), grad.double()


@pytest.fixture
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_as_exact_as_plain_torch(mask, dtype, width):
    qkv = torch.randn(2, mask.tokens, 3, 3, width, device="cuda").to(dtype)
    exact = run(qkv.double(), mask, "reference")
    plain, ours = run(qkv, mask, "reference"), run(qkv, mask, "triton")
    for name, limit, a, b, c in zip(
        ("output", "gradient"), (2, 3), ours, plain, exact, strict=True
    ):
        error, allowed = (a - c).abs().max(), limit * (b - c).abs().max()
        assert error <= allowed, f"{name}: {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_decoding_is_as_exact_as_plain_torch(mask, dtype):
    stepped, exact, plain = decode(mask, [3, 17], dtype, "triton", width=64, device="cuda")
    assert (stepped - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("mask", MASKS[:3], ids=str)
def test_equal_inputs_give_equal_bits(mask):
    qkv = torch.randn(2, mask.tokens, 3, 8, 64, device="cuda", dtype=torch.bfloat16)
    first = run(qkv, mask, "triton")
    for _ in range(5):
        assert all(a.equal(b) for a, b in zip(first, run(qkv, mask, "triton"), strict=True))


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_is_clean(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c"]
    done = subprocess.run([*command, SANITIZED], capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stdout[-3000:]
