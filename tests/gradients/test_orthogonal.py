import pytest
import torch

from dalle_dist.gradients.powersgd.orthogonal import gaussian_RN, orthonormal_BMR


@pytest.mark.parametrize("panel_rows", [16, 24, 40, 1000])
@pytest.mark.parametrize(
    ("rows", "rank"), [(8, 8), (9, 8), (31, 8), (64, 8), (67, 8), (64, 24), (24, 24)]
)
def test_basis_is_orthonormal_and_spans_the_columns(rows, rank, panel_rows):
    """Also where a panel would have fewer rows than columns."""
    p_BMR = torch.randn(3, rows, rank)
    basis = orthonormal_BMR(p_BMR.clone(), panel_rows)
    assert basis.shape == p_BMR.shape
    gram = basis.transpose(1, 2) @ basis
    torch.testing.assert_close(gram, torch.eye(rank).expand(3, rank, rank), rtol=0, atol=2e-6)
    torch.testing.assert_close(basis @ (basis.transpose(1, 2) @ p_BMR), p_BMR, rtol=0, atol=1e-5)


@pytest.mark.parametrize("panel_rows", [16, 1000])
@pytest.mark.parametrize("kind", ["zero", "equal columns", "one row", "tiny"])
def test_degenerate_columns_still_give_an_orthonormal_basis(kind, panel_rows):
    p_BMR = torch.zeros(1, 40, 8)
    if kind == "equal columns":
        p_BMR += torch.randn(1, 40, 1)
    elif kind == "one row":
        p_BMR[0, 39] = torch.randn(8)
    elif kind == "tiny":
        p_BMR += 1e-20 * torch.randn(1, 40, 8)
    basis = orthonormal_BMR(p_BMR, panel_rows)[0]
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), rtol=0, atol=2e-6)


@pytest.mark.parametrize("panel_rows", [16, 1000])
def test_columns_far_below_the_shift_give_way_to_it(panel_rows):
    """Of p + 1e-6 I with |p| near 1e-9 nothing but I is left."""
    basis = orthonormal_BMR(1e-9 * torch.randn(1, 40, 8), panel_rows)[0]
    torch.testing.assert_close(basis.abs(), torch.eye(40, 8), rtol=0, atol=2e-2)


def test_panels_of_graded_columns_stay_orthonormal():
    """Condition 1e7: Gram-Schmidt, and Cholesky of the Gram matrix, lose it in fp32."""
    p_BMR = torch.randn(1, 256, 8) * torch.logspace(0, -7, 8)
    p_BMR = p_BMR @ torch.linalg.qr(torch.randn(8, 8))[0]
    basis = orthonormal_BMR(p_BMR, 64)[0]
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), rtol=0, atol=2e-6)


def test_gaussian_depends_on_each_argument_and_on_nothing_else():
    torch.manual_seed(1)
    first = gaussian_RN(0, "w@0", 4, 500)
    torch.manual_seed(2)
    assert torch.equal(first, gaussian_RN(0, "w@0", 4, 500))
    assert abs(first.mean()) < 0.1 and abs(first.std() - 1) < 0.1
    for other in ((1, "w@0", 4, 500), (0, "w@8", 4, 500), (0, "w@0", 4, 501)):
        assert not torch.equal(first, gaussian_RN(*other)[:, :500])
