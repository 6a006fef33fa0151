import math

import pytest
import torch

from dalle_dist.gradients.powersgd.orthogonal import gaussian_RN, householder_BMR, orthonormal_BMR


def worst(basis_BMR):
    """Largest element of |P^T P - I|."""
    basis_BMR = basis_BMR.double()
    gram = basis_BMR.mT @ basis_BMR
    return float((gram - torch.eye(gram.shape[-1]).double()).abs().max())


def graded(rows, rank, condition):
    """Random, its singular values evenly spread on a logarithmic scale."""
    rotation = torch.linalg.qr(torch.randn(rank, rank).double())[0]
    basis = torch.linalg.qr(torch.randn(1, rows, rank).double())[0]
    return (basis * torch.logspace(0, -math.log10(condition), rank) @ rotation).float()


@pytest.mark.parametrize("how", [lambda p: orthonormal_BMR(p)[0], householder_BMR])
@pytest.mark.parametrize(("rows", "rank"), [(8, 8), (9, 8), (64, 8), (67, 24), (24, 24)])
def test_basis_is_orthonormal_and_spans_the_columns(rows, rank, how):
    p_BMR = torch.randn(3, rows, rank)
    given = p_BMR.clone()
    basis = how(p_BMR)
    assert basis.shape == p_BMR.shape and basis.dtype == p_BMR.dtype and p_BMR.equal(given)
    assert worst(basis) < 2e-6
    torch.testing.assert_close(basis @ (basis.mT @ p_BMR), p_BMR, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["zero", "equal columns", "one row", "tiny"])
def test_degenerate_columns_still_give_an_orthonormal_basis(kind):
    p_BMR = torch.zeros(1, 40, 8)
    if kind == "equal columns":
        p_BMR += torch.randn(1, 40, 1)
    elif kind == "one row":
        p_BMR[0, 39] = torch.randn(8)
    elif kind == "tiny":
        p_BMR += 1e-20 * torch.randn(1, 40, 8)
    basis, sound = orthonormal_BMR(p_BMR)
    assert sound.all() and worst(basis) < 2e-6


def test_columns_far_below_the_shift_give_way_to_it():
    """Of p + 1e-6 I with |p| near 1e-9 nothing but I is left."""
    basis = orthonormal_BMR(1e-9 * torch.randn(1, 40, 8))[0][0]
    torch.testing.assert_close(basis.abs(), torch.eye(40, 8), rtol=0, atol=2e-2)


@pytest.mark.parametrize("condition", [1e3, 1e5, 1e7])
def test_graded_columns_stay_orthonormal(condition):
    """Gram-Schmidt, and Cholesky of an fp32 Gram matrix, lose them."""
    basis, sound = orthonormal_BMR(graded(256, 16, condition))
    assert sound.all() and worst(basis) < 2e-6


def test_what_has_no_basis_by_cholesky_is_told_from_what_has_and_has_one_by_householder():
    """Columns that are equal beyond the shift; and a NaN, for which none is asked."""
    p_BMR = torch.randn(3, 40, 8)
    p_BMR[0] = 1e12 * torch.randn(40, 1)
    p_BMR[1, 3, 3] = torch.nan
    assert orthonormal_BMR(p_BMR)[1].tolist() == [False, True, True]
    assert worst(householder_BMR(p_BMR[:1])) < 2e-6


def test_gaussian_depends_on_each_argument_and_on_nothing_else():
    torch.manual_seed(1)
    first = gaussian_RN(0, "w@0", 4, 500)
    torch.manual_seed(2)
    assert torch.equal(first, gaussian_RN(0, "w@0", 4, 500))
    assert abs(first.mean()) < 0.1 and abs(first.std() - 1) < 0.1
    for other in ((1, "w@0", 4, 500), (0, "w@8", 4, 500), (0, "w@0", 4, 501)):
        assert not torch.equal(first, gaussian_RN(*other)[:, :500])
