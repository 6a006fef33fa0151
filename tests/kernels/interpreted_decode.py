"""The Triton decoding kernel under the interpreter; run by test_triton_attention.py."""

import pytest
import torch
from dalle_kernels.masks import AttentionMask
from decoding import decode, nan_memory

uninitialised_memory_is_nan = pytest.fixture(autouse=True)(nan_memory)
CASES = [
    ("row", "paper"), ("row", "dalle-pytorch"), ("column", "paper"), ("conv", "paper"),
    ("conv", "clamp"), ("conv", "torus"), ("conv", "dalle-pytorch"), ("causal", "paper"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("kind", "dialect"), CASES)
def test_as_exact_as_plain_torch(kind, dialect, dtype):
    for text, grid, samples, heads in ((1, 3, [1], 1), (5, 5, [2, 18, 1], 2)):
        mask = AttentionMask(kind, text, grid, dialect, kernel=3)
        stepped, exact, plain = decode(mask, samples, dtype, "triton", heads)
        assert stepped.isfinite().all()
        assert (stepped - exact).abs().max() <= 2 * (plain - exact).abs().max()
