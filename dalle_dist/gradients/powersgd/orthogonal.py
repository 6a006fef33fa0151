"""The two small matrices of PowerSGD: a seeded Gaussian, and an orthonormal basis.

Shapes: B batch, M rows (the shard's short side), N columns, R rank.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

JITTER = 1e-6
# If the second Gram matrix is as near to I as that, the second step leaves fp64's rounding alone.
CLOSE = 0.1


def gaussian_RN(seed: int, key: str, rank: int, columns: int) -> Tensor:
    """Q transposed: standard normal, a function of the arguments alone; fp32 on the CPU.

    Drawn on the CPU, whose generator gives the same numbers on every machine.
    """
    text = f"{seed}|{key}|{columns}x{rank}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(rank, columns, generator=generator)


def orthonormal_BMR(p_BMR: Tensor) -> tuple[Tensor, Tensor]:
    """(orthonormal bases of each p + 1e-6 I, whether each is one [B]) (paper E.2, step 5).

    The shift gives a column of zeros a direction. By CholeskyQR2: twice P := P R^-1, where R^T R is
    the Gram matrix P^T P, products of matrices that are batched on every device. Gram matrices
    square the condition number, so they are kept in fp64: what is orthonormal to fp32's last digits
    up to a condition of some 1e7. Beyond it is not a basis, which the second Gram matrix shows, as
    the identity that it should be; then `householder_BMR` gives one. No answer of the device is
    waited for. A matrix with a NaN or an infinity has no basis, and none is asked for.
    """
    basis_BMR, triangle, gram = _cholesky_qr(_shifted(p_BMR.double()))
    finite_B = torch.isfinite(gram.diagonal(dim1=1, dim2=2).sum(1))
    sound_B = triangle == 0
    basis_BMR, triangle, gram = _cholesky_qr(basis_BMR)
    gram.diagonal(dim1=1, dim2=2).sub_(1)
    sound_B &= (triangle == 0) & (gram.abs().amax((1, 2)) < CLOSE)
    return basis_BMR.float(), sound_B | ~finite_B


def householder_BMR(p_BMR: Tensor) -> Tensor:
    """The same bases for any condition, and far slower."""
    return torch.linalg.qr(_shifted(p_BMR.clone()))[0]


def _cholesky_qr(p_BMR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(P R^-1, not 0 where there is no R [B], P^T P)."""
    gram_BRR = torch.bmm(p_BMR.mT, p_BMR)
    factor_BRR, info_B = torch.linalg.cholesky_ex(gram_BRR)
    basis_BMR = torch.linalg.solve_triangular(factor_BRR.mT, p_BMR, upper=True, left=False)
    return basis_BMR, info_B, gram_BRR


def _shifted(p_BMR: Tensor) -> Tensor:
    p_BMR.diagonal(dim1=1, dim2=2).add_(JITTER)
    return p_BMR
