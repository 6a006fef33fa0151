"""Several tokens at once, at positions of their own, against the whole sequence at once."""

import itertools

import pytest
import torch
from dalle_kernels.masks import MASKS, AttentionMask, variants
from dalle_kernels.sparse_attention import reference
from dalle_kernels.sparse_attention.decode import DecodeCache
from dalle_kernels.sparse_attention.decode_block import BlockCache
from decoding import nan_memory

uninitialised_memory_is_nan = pytest.fixture(autouse=True)(nan_memory)


def sequences(mask, samples, heads=2, width=8):
    """(qkv_BN3HD, outputs of the image tokens): samples of a caption have its text in common."""
    first = [sum(samples[:c]) for c, count in enumerate(samples) for _ in range(count)]
    shape = (len(first), mask.tokens, 3, heads, width)
    qkv = torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    qkv[:, : mask.text] = qkv[first, : mask.text]
    return qkv, reference.attention(qkv, mask)[:, mask.text :]


def put_text(cache, qkv):
    owners = [sum(cache.samples[:c]) for c in range(len(cache.samples))]
    cache.put_text(*qkv[owners, : cache.mask.text, 1:].permute(2, 0, 3, 1, 4))


def guessed(mask, samples, window, prefix=0):
    """Outputs of windows that hold the tokens up to the first wrong guess, and noise after it."""
    qkv, exact = sequences(mask, samples)
    cache = BlockCache(mask, samples, window)
    put_text(cache, qkv)
    image = torch.nn.functional.pad(qkv[:, mask.text :], (0, 0) * 3 + (0, window))
    found = exact.clone().zero_()
    found[:, :prefix] = exact[:, :prefix]
    random = torch.Generator().manual_seed(7)
    first = torch.full((len(qkv),), prefix)
    while (first < mask.image).any():
        at = first[:, None] + torch.arange(window)
        right = torch.randint(1, window + 1, first.shape, generator=random)
        wrong = torch.arange(window) >= right[:, None]
        block = image[torch.arange(len(qkv))[:, None], at]
        noise = torch.randn(block.shape, dtype=torch.double, generator=random)
        block = torch.where(wrong[:, :, None, None, None], noise, block)
        out = cache.extend(first, *block.unbind(2))
        true = ~wrong & (at < mask.image)
        found[true.nonzero()[:, 0], at[true]] = out[true]
        first = (first + right).clamp(max=mask.image)
    return found, exact


@pytest.mark.parametrize(("kind", "variant"), itertools.product(MASKS, variants()))
@pytest.mark.parametrize(("grid", "window"), [(1, 1), (3, 2), (4, 5), (6, 4), (4, 16), (3, 11)])
def test_windows_equal_the_whole_sequence_whatever_was_guessed(kind, variant, grid, window):
    mask = AttentionMask(kind, 5, grid, variant, kernel=3)
    found, exact = guessed(mask, [2, 1, 3], window)
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("prefix", [1, 7, 20, 25])
@pytest.mark.parametrize("window", [None, 1, 6])
def test_both_caches_go_on_from_a_prefix_that_samples_share(kind, prefix, window):
    samples, mask = [2, 1], AttentionMask(kind, 3, 5, kernel=3)
    qkv, _ = sequences(mask, samples)
    qkv[1, mask.text : mask.text + prefix] = qkv[0, mask.text : mask.text + prefix]
    exact = reference.attention(qkv, mask)[:, mask.text :]
    cache = DecodeCache(mask, samples) if window is None else BlockCache(mask, samples, window)
    put_text(cache, qkv)
    shared = qkv[[0, 2], mask.text : mask.text + prefix, 1:].permute(2, 0, 3, 1, 4)
    cache.put_prefix(*shared)
    image = torch.nn.functional.pad(qkv[:, mask.text :], (0, 0) * 3 + (0, window or 0))
    for position in range(prefix, mask.image, window or 1):
        first = position if window is None else torch.full((3,), position)
        block = image[:, position : position + (window or 1)]
        out = cache.extend(first, *block.unbind(2))[:, : mask.image - position]
        torch.testing.assert_close(out, exact[:, position : position + (window or 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKS)
def test_as_exact_as_plain_torch(kind, dtype):
    mask = AttentionMask(kind, 9, 6, kernel=5)
    qkv, exact = sequences(mask, [2, 2])
    plain = reference.attention(qkv.to(dtype), mask)[:, mask.text :]
    cache = BlockCache(mask, [2, 2], 4)
    put_text(cache, qkv.to(dtype))
    found = [
        cache.extend(torch.full((4,), p), *qkv[:, mask.text + p :][:, :4].to(dtype).unbind(2))
        for p in range(0, mask.image, 4)
    ]
    assert found[0].dtype == dtype
    error = (torch.cat(found, dim=1) - exact).abs().max()
    assert error <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize(
    ("kind", "variant", "slots"),
    [
        ("row", "paper", 32 + 16),
        ("row", "dalle-pytorch", 31 + 16),
        ("conv", "paper", 191 + 16),
        ("column", "paper", 1024 + 32),
    ],
)
def test_bytes_at_the_papers_shape(kind, variant, slots):
    cache = BlockCache(AttentionMask(kind, 256, 32, variant), [4, 4], 16)
    text = torch.zeros(2, 3, 256, 64, dtype=torch.float16)
    cache.put_text(text, text)
    assert cache.nbytes == 2 * 3 * 64 * 2 * 2 * (256 + 4 * slots)


def test_arguments_that_do_not_fit_are_named():
    mask, first = AttentionMask("row", 2, 3), torch.zeros(1).long()
    with pytest.raises(ValueError, match=r"^block: 0 is below 1"):
        BlockCache(mask, [1], 0)
    cache, block = BlockCache(mask, [1], 2), torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match=r"^text: none is there"):
        cache.extend(first, block, block, block)
    put_text(cache, torch.zeros(1, 2, 3, 1, 8))
    with pytest.raises(ValueError, match=r"^q: 1 positions are not the block's 2"):
        cache.extend(first, *[block[:, :1]] * 3)
    with pytest.raises(ValueError, match=r"^prefix: 10 tokens are not 0 to 9"):
        cache.put_prefix(*torch.zeros(2, 1, 1, 10, 8))
