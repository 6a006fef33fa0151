"""Fréchet distance between Gaussians: FID where the features are Inception's (arXiv 1706.08500).

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2)

With S = R R^T the last trace is the sum of the singular values of R1^T R2. So no root of a matrix
that is not symmetric is ever taken, and nothing is added to a diagonal.

Shape suffixes: D features, K dimensions that a Gaussian extends in.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from dalle_dist.errors import DataError
from dalle_dist.evaluation.moments import Gaussian


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """The squared distance, in squared units of the features; at least 0.

    Warns where a covariance is of no more samples than there are features: it misses directions,
    and the distance is then far too high for finite samples of equal distributions.

    Raises:
        DataError: the two have not as many features, or values that are not finite.
    """
    _check(first, second)
    _warn_of_few(first, second)
    shift_D = first.mean_D - second.mean_D
    traces = first.covariance_DD.trace() + second.covariance_DD.trace()
    overlap = _overlap(first.covariance_DD, second.covariance_DD)
    return max(0.0, float(shift_D @ shift_D + traces - 2 * overlap))


def _overlap(first_DD: Tensor, second_DD: Tensor) -> Tensor:
    """tr sqrt(S1 S2)."""
    lower_DD, failed = torch.linalg.cholesky_ex(first_DD)
    if failed == 0 and torch.linalg.cholesky_ex(second_DD)[1] == 0:
        # A fifth of the time of singular values, and as exact while no eigenvalue is zero.
        squares_D = torch.linalg.eigvalsh(lower_DD.T @ second_DD @ lower_DD)
        return squares_D.clamp_min(0).sqrt().sum()
    return torch.linalg.svdvals(_root(first_DD).T @ _root(second_DD)).sum()


def _root(covariance_DD: Tensor) -> Tensor:
    """root_DK with root_DK @ root_DK.T = covariance_DD, of the directions that are not noise.

    Eigenvalues that should be zero are off by rounding, and their roots are eight digits larger.
    """
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    noise = len(values_D) * torch.finfo(values_D.dtype).eps * values_D[-1]
    kept = values_D > noise
    return vectors_DD[:, kept] * values_D[kept].sqrt()


def _check(first: Gaussian, second: Gaussian) -> None:
    sizes = len(first.mean_D), len(second.mean_D)
    if sizes[0] != sizes[1]:
        raise DataError(f"{sizes[0]} and {sizes[1]} features: not of the same feature network")
    for values in (first.mean_D, first.covariance_DD, second.mean_D, second.covariance_DD):
        if not values.isfinite().all():
            raise DataError("a mean or covariance of features is not finite")


def _warn_of_few(*gaussians: Gaussian) -> None:
    for gaussian in gaussians:
        count, dim = gaussian.count, len(gaussian.mean_D)
        if count is not None and count <= dim:
            warnings.warn(
                f"Fréchet distance of {count} images by {dim} features: the covariance has not "
                f"full rank, the figure is biased upwards; take more than {dim} images",
                stacklevel=3,
            )
