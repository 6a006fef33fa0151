"""Codes in use, and the entropy of the codes."""

import math

import pytest
import torch

from dalle_dist.metrics.codes import code_counts, entropy, share_in_use


def test_codes_are_counted_in_any_shape():
    counts = code_counts(torch.tensor([[1, 1], [3, 1]]), 8)
    assert counts.tolist() == [0, 3, 0, 1, 0, 0, 0, 0]
    assert share_in_use(counts) == 0.25
    assert entropy(counts) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_entropy_at_its_ends():
    assert entropy(torch.tensor([0, 5, 0])) == 0
    assert entropy(torch.full((16,), 7)) == pytest.approx(math.log(16))
