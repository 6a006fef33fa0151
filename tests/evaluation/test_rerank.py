"""Best of N against brute force."""

import itertools

import pytest
import torch

from dalle_dist.errors import ConfigError, DataError
from dalle_dist.evaluation.rerank import best_of, best_of_curve, choose, counts, expected_best_of


def drawn(captions=5, candidates=8):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (captions, candidates), generator=generator).float()
    return scores, torch.rand(captions, candidates, generator=generator)


def test_counts_are_the_papers():
    assert counts(512) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert counts(6) == [1, 2, 4]


def test_the_best_of_the_first_is_the_first_of_equals():
    scores, measures = drawn()
    for n in range(1, 9):
        expected = [max(range(n), key=lambda i: (row[i], -i)) for row in scores.tolist()]
        assert best_of(scores, n).tolist() == expected
    assert best_of(torch.tensor([[1.0, 3, 3, 9]]), 3).tolist() == [1]
    curve = best_of_curve(scores, measures)
    assert list(curve) == [1, 2, 4, 8]
    rows = zip(scores[:, :4].tolist(), measures.tolist(), strict=True)
    four = [m[max(range(4), key=lambda i: (s[i], -i))] for s, m in rows]
    assert curve[4] == pytest.approx(sum(four) / 5)


def test_the_expectation_is_that_over_all_subsets():
    scores, measures = drawn()
    for n in range(1, 9):
        found = [
            m[max(subset, key=lambda i: (s[i], -i))]
            for s, m in zip(scores.tolist(), measures.tolist(), strict=True)
            for subset in itertools.combinations(range(8), n)
        ]
        assert expected_best_of(scores, measures, n) == pytest.approx(sum(found) / len(found))


def test_hundreds_of_candidates_do_not_overflow():
    scores = torch.randperm(512, generator=torch.Generator().manual_seed(0)).float()[None]
    ranks = (512 - scores) / 1  # 1: the best
    for n in (1, 32, 256, 512):
        assert expected_best_of(scores, ranks, n) == pytest.approx(513 / (n + 1), rel=1e-9)


def test_features_of_the_chosen():
    features = torch.arange(24.0).view(2, 4, 3)
    assert choose(features, torch.tensor([3, 0])).tolist() == [[9, 10, 11], [12, 13, 14]]


def test_what_cannot_be_chosen_is_refused():
    scores, _ = drawn()
    for n in (0, 9):
        with pytest.raises(ConfigError, match=f"best of {n}: from 1 to 8"):
            best_of(scores, n)
    scores[2, 7] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        best_of(scores, 2)
