"""What the tests of decoding share: a whole sequence, generated token by token from the cache."""

import torch
from dalle_kernels.sparse_attention import reference
from dalle_kernels.sparse_attention.decode import DecodeCache


def decode(mask, samples, dtype, backend, heads=2, width=32, device="cpu", at=int, seed=3):
    """(stepped, exact, plain) outputs of the image tokens: ours, fp64's and torch's in `dtype`.

    `at` makes of a position what the cache is given. `seed`: of the random inputs.
    """
    owner = [c for c, count in enumerate(samples) for _ in range(count)]
    shape = (len(owner), mask.tokens, 3, heads, width)
    qkv = torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    # Samples of a caption have its text in common.
    first = [owner.index(c) for c in owner]
    qkv[:, : mask.text] = qkv[first, : mask.text]
    qkv = qkv.to(device, dtype)
    text = qkv[[owner.index(c) for c in range(len(samples))], : mask.text]
    cache = DecodeCache(mask, samples)
    cache.put_text(*text[:, :, 1:].permute(2, 0, 3, 1, 4))
    stepped = []
    for position in range(mask.image):
        token = qkv[:, mask.text + position :][:, :1]
        stepped.append(cache.extend(at(position), *token.unbind(2), backend)[:, 0])
    exact, plain = (reference.attention(x, mask)[:, mask.text :] for x in (qkv.double(), qkv))
    return torch.stack(stepped, 1), exact, plain


def nan_memory():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
