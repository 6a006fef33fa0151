"""Nearest neighbours chunk by chunk against brute force."""

import pytest
import torch
import torch.nn.functional as F

from dalle_dist.errors import DataError
from dalle_dist.evaluation.overlap import nearest_cosine


def drawn(count, seed):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 2, 7, 50, 99])
@pytest.mark.parametrize("k", [1, 3])
def test_chunks_find_what_brute_force_finds(chunk, k):
    queries, others = drawn(9, 0), drawn(50, 1)
    others[33] = 4 * queries[2]  # a copy, whatever its length
    similar = torch.tensor(
        [[F.cosine_similarity(q, o, dim=0).item() for o in others] for q in queries]
    )
    expected, at = similar.sort(dim=1, descending=True)
    indices, similarities = nearest_cosine(queries, others.split(chunk), k)
    assert indices.equal(at[:, :k])
    torch.testing.assert_close(similarities, expected[:, :k], rtol=1e-5, atol=1e-6)
    assert indices[2, 0] == 33 and similarities[2, 0] == pytest.approx(1)


@pytest.mark.parametrize("chunk", [1, 4, 40])
@pytest.mark.parametrize("k", [1, 3])
def test_of_equally_similar_ones_the_first_comes_first(chunk, k):
    others = torch.eye(6)[[0] * 3 + [1] * 37]
    others[5:] += 1e-5 * drawn(35, 2)
    indices, similarities = nearest_cosine(torch.eye(6)[1:2], others.split(chunk), k, decimals=3)
    assert indices[0].tolist() == [3, 4, 5][:k]
    assert similarities[0].tolist() == [1] * k


def test_fewer_than_asked_for():
    indices, similarities = nearest_cosine(drawn(2, 0), [drawn(1, 1)], 3)
    assert indices[:, 0].tolist() == [0, 0] and indices[:, 1:].eq(-1).all()
    assert similarities[:, 1:].isneginf().all()


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="3 features, looked up are 6"):
        nearest_cosine(drawn(2, 0), [drawn(4, 1)[:, :3]])
    with pytest.raises(DataError, match="not finite"):
        nearest_cosine(drawn(2, 0), [drawn(4, 1) / 0])
