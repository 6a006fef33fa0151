"""Triton kernels under the interpreter; run by test_triton_attention.py, which sets it up.

fp32 and fp16 only: the interpreter's bf16 arithmetic is wrong without a word.
"""

import pytest
import torch
from dalle_kernels.masks import MASKS, AttentionMask
from dalle_kernels.sparse_attention import reference, sparse_attention, triton_attention
from dalle_kernels.sparse_attention.triton_config import Tiles
from test_sparse_attention import errors
from toy_masks import RULES, registered

CASES = [(kind, variant) for kind, rules in MASKS.items() for variant in rules]
SLOWLY = pytest.mark.slow
# Text, grid, batch, heads. The interpreter takes seconds for each: the quick tests have the one
# that needs several tiles, a ragged one among them, of the paper's masks.
QUICK, *SLOW = ((18, 4, 1, 2), (1, 1, 1, 1), (5, 3, 2, 1), (16, 6, 2, 2))
RUNS = [
    pytest.param(*case, shape, marks=[] if is_quick else SLOWLY)
    for case in CASES
    for shape in (QUICK, *SLOW)
    for is_quick in [shape == QUICK and case[1] == "paper"]
]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def small_tiles(monkeypatch):
    """Tiles of 16, the least that tl.dot takes: several tiles, and ragged ones, in small grids."""
    for name in ("forward_tiles", "backward_tiles"):
        monkeypatch.setattr(triton_attention, name, lambda *_: Tiles(16, 16, 16, 4, 1))


def assert_as_exact_as_plain_torch(mask, dtype, **shape):
    draws = 2 if mask.tokens > 16 else 8 if mask.tokens > 2 else 32
    ours, plain = (
        errors(mask, dtype, backend, draws, **shape) for backend in ("triton", "reference")
    )
    assert ours[0] <= 2 * plain[0], f"output: {ours[0]:.3g} against {plain[0]:.3g}"
    assert ours[1] <= 3 * plain[1], f"gradient: {ours[1]:.3g} against {plain[1]:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("kind", "variant", "shape"), RUNS)
def test_as_exact_as_plain_torch(monkeypatch, kind, variant, shape, dtype):
    small_tiles(monkeypatch)
    text, grid, batch, heads = shape
    mask = AttentionMask(kind, text, grid, variant, kernel=3)
    assert_as_exact_as_plain_torch(mask, dtype, batch=batch, heads=heads, width=32)


@pytest.mark.parametrize("kind", RULES)
def test_a_new_mask_needs_no_new_kernel(monkeypatch, kind):
    small_tiles(monkeypatch)
    mask = registered(monkeypatch, kind, 18, 5)
    assert_as_exact_as_plain_torch(mask, torch.float32, batch=1, heads=1, width=32)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_chosen_tiles(width):
    """The real configurations, on a grid smaller than their tiles."""
    for dtype in (torch.float32, torch.float16):
        assert_as_exact_as_plain_torch(
            AttentionMask("conv", 9, 4, kernel=3), dtype, batch=1, heads=1, width=width
        )


def test_scores_of_text_keys_by_keys_first(monkeypatch):
    tiles = Tiles(16, 16, 16, 4, 1, keys_first=True)
    monkeypatch.setattr(triton_attention, "backward_tiles", lambda *_: tiles)
    for text, grid in ((18, 4), (5, 3)):
        assert_as_exact_as_plain_torch(
            AttentionMask("row", text, grid), torch.float16, batch=1, heads=2, width=32
        )


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_scores_of_image_keys_by_keys_first(monkeypatch, kind):
    """In tiles of 64, the second of which ends past the image."""
    tiles = Tiles(16, 16, 64, 4, 1, keys_first=True)
    monkeypatch.setattr(triton_attention, "backward_tiles", lambda *_: tiles)
    assert_as_exact_as_plain_torch(
        AttentionMask(kind, 5, 9, kernel=3), torch.float16, batch=1, heads=2, width=32
    )


def test_qkv_that_is_a_view_of_something_wider(monkeypatch):
    small_tiles(monkeypatch)
    mask = AttentionMask("row", 5, 4)
    wide = torch.randn(2, mask.tokens + 3, 3, 2, 40)
    view = wide[:, 2:-1, ..., 8:]
    torch.testing.assert_close(
        sparse_attention(view, mask, "triton"), reference.attention(view, mask)
    )


def test_equal_inputs_give_equal_bits(monkeypatch):
    small_tiles(monkeypatch)
    mask = AttentionMask("conv", 18, 5, kernel=3)
    qkv = torch.randn(2, mask.tokens, 3, 2, 32, requires_grad=True)
    runs = []
    for _ in range(2):
        out = sparse_attention(qkv, mask, "triton")
        runs.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))
