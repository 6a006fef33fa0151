"""Steps from the cache against the whole sequence at once; what the cache keeps."""

import itertools

import pytest
import torch
from dalle_kernels.masks import MASKS, AttentionMask, variants
from dalle_kernels.sparse_attention.decode import DecodeCache
from dalle_kernels.sparse_attention.triton_config import decode_splits
from decoding import decode, nan_memory

uninitialised_memory_is_nan = pytest.fixture(autouse=True)(nan_memory)


@pytest.mark.parametrize(("kind", "variant"), itertools.product(MASKS, variants()))
@pytest.mark.parametrize(("text", "samples", "heads"), [(1, [1], 1), (5, [2, 1, 3], 2)])
def test_steps_equal_the_whole_sequence(kind, variant, text, samples, heads):
    for grid in (1, 3, 4, 6):
        mask = AttentionMask(kind, text, grid, variant, kernel=3)
        stepped, exact, _ = decode(mask, samples, torch.double, "torch", heads)
        torch.testing.assert_close(stepped, exact, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKS)
def test_as_exact_as_plain_torch(kind, dtype):
    mask = AttentionMask(kind, 9, 8, kernel=5)
    stepped, exact, plain = decode(mask, [2, 2], dtype, "torch")
    assert (stepped - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize(
    ("kind", "variant", "slots"),
    [
        ("row", "paper", 33),
        ("conv", "paper", 192),
        ("conv", "clamp", 166),
        ("column", "paper", 1024),
    ],
)
def test_bytes_at_the_papers_shape(kind, variant, slots):
    """The text's once per caption, the images' for as many slots as the mask needs."""
    captions, samples, heads, width = 2, 4, 3, 64
    cache = DecodeCache(AttentionMask(kind, 256, 32, variant), [samples] * captions)
    text = torch.zeros(captions, heads, 256, width, dtype=torch.float16)
    cache.put_text(text, text)
    pair = 2 * heads * width * 2  # key and value, two bytes a number
    assert cache.nbytes == pair * captions * (256 + samples * slots)


@pytest.mark.parametrize(
    ("programs", "text_tiles", "splits"),
    [
        *[(62, 4, 4), (66, 4, 4), (67, 4, 2), (124, 4, 2), (133, 4, 1), (5_000, 4, 1), (2, 9, 4)],
        *[(1, 3, 2), (1, 1, 1)],  # a split without text would have no finite maximum
    ],
)
def test_few_programs_are_split_and_many_are_not(programs, text_tiles, splits):
    assert decode_splits(programs, text_tiles, multiprocessors=132) == splits


def test_arguments_that_do_not_fit_are_named():
    mask = AttentionMask("row", 4, 4)
    with pytest.raises(ValueError, match=r"^samples: "):
        DecodeCache(mask, [1, 0])
    with pytest.raises(ValueError, match=r"^text: "):
        DecodeCache(mask, [1]).put_text(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8))
    with pytest.raises(ValueError, match=r"^k, v: shapes"):
        DecodeCache(mask, [1]).put_text(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 16))
    with pytest.raises(ValueError, match=r"^mask: str is not an AttentionMask"):
        DecodeCache("row", [1])
    with pytest.raises(ValueError, match=r"^samples: 3 is not a sequence"):
        DecodeCache(mask, 3)
    with pytest.raises(ValueError, match=r"^text: none is there"):
        DecodeCache(mask, [1]).extend(0, *torch.zeros(3, 1, 1, 1, 8))


def test_steps_that_do_not_fit_are_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    mask, one = AttentionMask("row", 2, 3, kernel=3), torch.zeros(1, 1, 1, 32)
    cache = DecodeCache(mask, [2])
    cache.put_text(*torch.zeros(2, 1, 1, 2, 32))
    two = torch.zeros(2, 1, 1, 32)
    for position in (-1, 9):
        with pytest.raises(ValueError, match=f"^position: {position} is not in 0 to 8"):
            cache.extend(position, two, two, two)
    with pytest.raises(ValueError, match=r"^k: shape \(1, 1, 1, 32\) is not \(2, 1, 1, 32\)"):
        cache.extend(0, two, one, two)
    with pytest.raises(ValueError, match=r"^q: shape"):
        cache.extend(0, one, two, two)
    with pytest.raises(ValueError, match=r"^backend: 'tritn' is not one of"):
        cache.extend(0, two, two, two, "tritn")
    with pytest.raises(ValueError, match=r"^backend: 'triton' cannot run here: "):
        cache.extend(0, two, two, two, "triton")
    assert cache.extend(0, two, two, two).shape == two.shape
