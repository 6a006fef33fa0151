"""A new mask is one entry in one table: no backend is edited, none knows a mask by its name."""

import re
from pathlib import Path

import dalle_kernels
import pytest
import torch
from dalle_kernels.spans import span
from dalle_kernels.sparse_attention import sparse_attention
from decoding import decode, nan_memory
from test_sparse_attention import inputs, slow
from toy_masks import RULES, allowed, registered

uninitialised_memory_is_nan = pytest.fixture(autouse=True)(nan_memory)
BY_NAME = re.compile(r"""\b(kind|variant)\b\s*(==|!=|\bin\b)|["'](row|column|conv|causal)["']""")
# The table itself, and the cases whose registers are counted.
MAY_NAME_MASKS = ("masks.py", "resources.py")


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("grid", [1, 2, 5])
def test_its_matrix_is_what_a_slow_loop_says(monkeypatch, kind, grid):
    mask = registered(monkeypatch, kind, 2, grid)
    cells = range(grid**2)
    loop = torch.tensor([[allowed(kind, grid, query, key) for key in cells] for query in cells])
    assert mask.dense()[2:, 2:].equal(loop)
    query, key = loop.nonzero().unbind(1)
    apart = [mask.scan(q) - mask.scan(k) for q, k in zip(query.tolist(), key.tolist(), strict=True)]
    assert span(mask).window == max(apart)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_attention_and_gradient_are_a_slow_loops(monkeypatch, kind, backend):
    mask = registered(monkeypatch, kind, 3, 8)
    qkv = inputs(mask)
    expected = slow(qkv, mask)
    out = sparse_attention(qkv, mask, backend)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    grads = (torch.autograd.grad(x.square().sum(), qkv)[0] for x in (out, expected))
    torch.testing.assert_close(*grads, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("grid", [1, 2, 5])
def test_decoding_equals_the_whole_sequence(monkeypatch, kind, grid):
    mask = registered(monkeypatch, kind, 3, grid)
    stepped, exact, _ = decode(mask, [2, 1], torch.double, "torch")
    torch.testing.assert_close(stepped, exact, atol=1e-12, rtol=1e-12)


def test_no_other_file_knows_a_mask_by_its_name():
    package = Path(dalle_kernels.__file__).parent
    assert BY_NAME.search('if mask.kind == "causal":')
    found = [
        f"{path.relative_to(package)}:{number}"
        for path in sorted(package.rglob("*.py"))
        if path.name not in MAY_NAME_MASKS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BY_NAME.search(line)
    ]
    assert not found
    table = (package / "masks.py").read_text()
    assert not re.search(r"\b(kind|variant) (==|!=) ", table)
