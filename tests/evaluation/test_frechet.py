"""Fréchet distances against closed forms, and against the formulas that others use."""

import warnings

import numpy as np
import pytest
import torch

from dalle_dist.errors import DataError
from dalle_dist.evaluation.frechet import frechet_distance
from dalle_dist.evaluation.moments import STRIP, Gaussian, Moments
from dalle_dist.testing import run_distributed

D = 24


def draw(count, dim=D, seed=0, decay=0.0, offset=0.0):
    """Correlated features whose directions differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    scale = torch.arange(1, dim + 1) ** -decay
    return torch.randn(count, dim, generator=generator) * scale @ mixing.float() + offset


def moments(features, batch=None):
    found = Moments(features.shape[1])
    for part in features.split(batch or len(features)):
        found.add(part)
    return found


def gaussian(features):
    return moments(features).gaussian()


def rotated(values, seed=1):
    """A covariance with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis * torch.tensor(values, dtype=torch.float64) @ basis.T


def by_singular_values(first, second):
    """Of the features themselves: no covariance is ever formed."""
    parts = [(x.double() - x.double().mean(0)) / (len(x) - 1) ** 0.5 for x in (first, second)]
    shift = first.double().mean(0) - second.double().mean(0)
    both = torch.linalg.svdvals(parts[0] @ parts[1].T).sum()
    return (shift.square().sum() + sum(x.square().sum() for x in parts) - 2 * both).item()


def by_eigenvalues_of_the_product(first, second):
    """As torch-fidelity and torchmetrics have it."""
    a, b = (np.cov(x.double().numpy(), rowvar=False) for x in (first, second))
    shift = (first.double().mean(0) - second.double().mean(0)).numpy()
    roots = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    return float(shift @ shift + np.trace(a) + np.trace(b) - 2 * roots)


def by_the_matrix_root(first, second):
    """As pytorch-fid and clean-fid have it."""
    linalg = pytest.importorskip("scipy.linalg")
    a, b = (np.cov(x.double().numpy(), rowvar=False) for x in (first, second))
    shift = (first.double().mean(0) - second.double().mean(0)).numpy()
    root = linalg.sqrtm(a @ b)
    return float(shift @ shift + np.trace(a) + np.trace(b) - 2 * np.trace(root).real)


def test_commuting_covariances():
    a, b = [4.0, 1.0, 9.0, 0.25], [1.0, 1.0, 16.0, 4.0]
    mean = torch.tensor([1.0, -2, 0, 0.5], dtype=torch.float64)
    first, second = Gaussian(mean, rotated(a)), Gaussian(mean * 0, rotated(b))
    expected = 5.25 + sum((x**0.5 - y**0.5) ** 2 for x, y in zip(a, b, strict=True))
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_one_dimension_and_a_mere_shift():
    one = [torch.tensor([[x]], dtype=torch.float64) for x in (9.0, 4.0)]
    a, b = Gaussian(torch.tensor([2.0]).double(), one[0]), Gaussian(torch.zeros(1).double(), one[1])
    assert frechet_distance(a, b) == pytest.approx(4 + (3 - 2) ** 2)
    features = draw(200)
    shifted = gaussian(features + 0.5)
    assert frechet_distance(gaussian(features), shifted) == pytest.approx(D / 4, rel=1e-6)


@pytest.mark.parametrize("count", [10, 500])
def test_identical_features_have_no_distance(count):
    same = gaussian(draw(count, decay=2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert frechet_distance(same, same) < 1e-9


@pytest.mark.parametrize("decay", [0.0, 1.5])
@pytest.mark.parametrize(
    ("rival", "rel"),
    [
        (by_singular_values, 1e-10),
        (by_eigenvalues_of_the_product, 1e-7),
        (by_the_matrix_root, 1e-7),
    ],
)
def test_other_formulas_agree(rival, rel, decay):
    first, second = draw(300, decay=decay), draw(400, seed=5, decay=decay, offset=0.1)
    found = frechet_distance(gaussian(first), gaussian(second))
    assert found == pytest.approx(rival(first, second), rel=rel)
    assert found == pytest.approx(frechet_distance(gaussian(second), gaussian(first)), rel=1e-10)


def test_fewer_images_than_features_are_exact_and_warned_of():
    first, second = draw(9), draw(300, seed=5)
    with pytest.warns(UserWarning, match="9 images by 24 features"):
        found = frechet_distance(gaussian(first), gaussian(second))
    assert found == pytest.approx(by_singular_values(first, second), rel=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(gaussian(draw(D + 1)), gaussian(second))


def test_features_that_are_always_zero():
    first, second = draw(300), draw(300, seed=5)
    first[:, 3] = second[:, 3] = second[:, 7] = 0
    found = frechet_distance(gaussian(first), gaussian(second))
    assert found == pytest.approx(by_singular_values(first, second), rel=1e-10)


def test_moments_are_those_of_numpy_for_any_batches():
    features = draw(101, offset=1e3)
    expected = np.cov(features.double().numpy(), rowvar=False)
    for batch in (1, 7, 100, 101):
        found = moments(features, batch).gaussian()
        np.testing.assert_allclose(found.covariance_DD, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(found.mean_D, features.double().mean(0), rtol=1e-14, atol=0)
        assert found.count == 101
    backwards = moments(features.flip(0), 7).gaussian()
    torch.testing.assert_close(backwards.covariance_DD, found.covariance_DD, rtol=1e-11, atol=1e-11)


def test_more_features_than_one_strip():
    features = draw(40, dim=STRIP + 7)
    expected = np.cov(features.double().numpy(), rowvar=False)
    found = moments(features, 9).gaussian().covariance_DD
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)


def test_merged_moments_are_those_of_all():
    features = draw(60, offset=100.0)
    whole, parts = moments(features), moments(features[:7])
    parts.merge(Moments(D))
    parts.merge(moments(features[7:]))
    assert parts.count == 60
    torch.testing.assert_close(
        parts.gaussian().covariance_DD, whole.gaussian().covariance_DD, rtol=1e-11, atol=1e-10
    )


def _merged_over_ranks(ranks):
    shares = [slice(0, 7), slice(7, 60), slice(60, 60)]  # the last rank has none
    mine = moments(draw(60, offset=100.0)[shares[ranks.rank]], 11)
    mine.merge_ranks(ranks)
    # As lists: a tensor travels as a handle that its process must still be there to give.
    return mine.count, mine.mean_D.tolist(), mine.gaussian().covariance_DD.tolist()


def test_ranks_merge_to_the_moments_of_all():
    whole = moments(draw(60, offset=100.0))
    expected = whole.gaussian().covariance_DD
    for count, mean, covariance in run_distributed(_merged_over_ranks, 3):
        assert count == 60
        assert mean == pytest.approx(whole.mean_D.tolist(), rel=1e-13)
        np.testing.assert_allclose(covariance, expected, rtol=1e-11, atol=1e-10)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(DataError, match="24 and 5 features"):
        frechet_distance(gaussian(draw(50)), gaussian(draw(50, dim=5)))
    with pytest.raises(DataError, match="not finite"):
        Moments(2).add(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(DataError, match="1 images"):
        moments(draw(1)).gaussian()
