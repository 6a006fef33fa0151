"""What the GPU benchmark of generating says a step must at least take."""

import pytest
from dalle_kernels.masks import AttentionMask
from tiny_generator import build

from benchmarks import generate_gpu
from benchmarks.attention_gpu import Peak


@pytest.mark.parametrize(
    ("kind", "pairs"), [("row", 33_264), ("column", 16_896), ("causal", 524_800)]
)
def test_keys_are_the_masks_pairs(kind, pairs):
    assert generate_gpu.keys(AttentionMask(kind, 256, 32)) == pairs / 1024


def test_floors_by_hand():
    rates = Peak(flops=10.0, bytes=2.0, exps=1.0)
    generator = build("transformer.masks=causal")
    blocks = sum(p.numel() for p in generator.model.blocks.parameters())
    unembedding = 64 * 20 + 20
    # Of 4 layers: 6 tokens of text, and of 3 images (1 + ... + 16) / 16 keys on average, each
    # with a key and a value of 64 bf16 numbers.
    cache = 4 * (6 + 3 * 8.5) * 2 * 64 * 2
    found = generate_gpu.memory_seconds(generator.model, generator.config, 3, rates)
    assert found == (4 * (blocks + unembedding) + cache) / 2
    assert generate_gpu.product_seconds(generator.model, 3, rates) == 2 * blocks * 3 / 10
