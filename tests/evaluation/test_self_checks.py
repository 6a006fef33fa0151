"""The figures that stand beside every distance."""

import pytest
import torch

from dalle_dist.errors import DataError
from dalle_dist.evaluation import self_checks
from dalle_dist.evaluation.self_checks import halves_check, known_pair


def test_the_known_pair_is_found():
    found, right = known_pair(64)
    assert found == pytest.approx(right, rel=1e-10) and right > 1
    assert known_pair(64) == (found, right)


def test_a_wrong_distance_is_seen(monkeypatch):
    distance = self_checks.frechet_distance
    monkeypatch.setattr(self_checks, "frechet_distance", lambda a, b: 1.001 * distance(a, b))
    found, right = known_pair(64)
    assert found != pytest.approx(right, rel=1e-4)


def test_halves_come_nearer_with_more_images(recwarn):
    features = torch.randn(4001, 8, generator=torch.Generator().manual_seed(0))
    found = [halves_check(features[:count]) for count in (10, 100, 4001)]
    assert found[0] > 5 * found[1] and found[1] > 20 * found[2] > 0
    assert halves_check(features[:100]) == found[1]
    assert halves_check(features[:100], seed=1) != found[1]
    # Sorted images: halves in the order of the files would be two distributions.
    assert halves_check(features.sort(dim=0).values) < 0.05
    assert not recwarn.list
    with pytest.raises(DataError, match="at least 2"):
        halves_check(features[:3])
