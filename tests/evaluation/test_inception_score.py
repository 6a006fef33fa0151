"""Inception scores with known answers, and their independence of batches and ranks."""

import math

import numpy as np
import pytest
import torch

from dalle_dist.errors import ConfigError, DataError
from dalle_dist.evaluation.inception_score import InceptionScore
from dalle_dist.testing import run_distributed


def score(probabilities, splits=10, batch=None):
    found = InceptionScore(len(probabilities), probabilities.shape[1], splits)
    indices = torch.arange(len(probabilities))
    for part in indices.split(batch or len(probabilities)):
        found.add(part, probabilities[part])
    return found.result()


def random_probabilities(count=103, classes=7):
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(count, classes, generator=generator)).softmax(dim=1)


def test_the_ends_of_the_scale():
    assert score(torch.full((50, 8), 1 / 8)) == pytest.approx((1, 0))
    assert score(torch.eye(8).repeat(6, 1), splits=1) == pytest.approx((8, 0))
    assert score(torch.eye(8)[:1].expand(20, 8)) == pytest.approx((1, 0))


def test_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    q = [0.65, 0.35]
    kl = [sum(a * math.log(a / b) for a, b in zip(row, q, strict=True)) for row in p.tolist()]
    assert score(p, splits=1)[0] == pytest.approx(math.exp(sum(kl) / 2), rel=1e-6)


def test_splits_are_those_of_torch_fidelity():
    """Its published rule: shuffled by numpy's generator of seed 2020, cut at i * N // 10."""
    p = random_probabilities().double().numpy()
    p = p[np.random.RandomState(2020).permutation(len(p))]
    scores = []
    for i in range(10):
        part = p[i * len(p) // 10 : (i + 1) * len(p) // 10]
        kl = (part * np.log(part / part.mean(axis=0))).sum(axis=1)
        scores.append(np.exp(kl.mean()))
    found = score(random_probabilities())
    assert found == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-6)
    assert found[1] > 0.01


def test_batches_do_not_matter():
    p = random_probabilities()
    assert score(p, batch=1) == pytest.approx(score(p, batch=40), rel=1e-12)


def _shared(ranks):
    p = random_probabilities()
    found = InceptionScore(len(p), p.shape[1])
    mine = torch.arange(ranks.rank, len(p), ranks.world)
    found.add(mine, p[mine])
    found.merge_ranks(ranks)
    return found.result()


def test_ranks_do_not_matter():
    for found in run_distributed(_shared, 2):
        assert found == pytest.approx(score(random_probabilities()), rel=1e-12)


def test_what_is_no_score_is_refused():
    with pytest.raises(ConfigError, match="9 images"):
        InceptionScore(9, 3)
    found = InceptionScore(20, 3)
    for wrong in ([[1.0, 2.0, 3.0]], [[1.5, -0.5, 0.0]], [[torch.nan, 0.0, 1.0]]):
        with pytest.raises(DataError, match="do not sum to 1"):
            found.add(torch.tensor([0]), torch.tensor(wrong))
    found.add(torch.tensor([0] * 20), torch.full((20, 3), 1 / 3))
    with pytest.raises(DataError, match="twice"):
        found.result()
