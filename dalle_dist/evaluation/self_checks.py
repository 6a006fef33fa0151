"""Distances whose right answer is known, to be printed beside every Fréchet distance.

Shape suffixes: N images, D features.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from dalle_dist.evaluation.frechet import frechet_distance
from dalle_dist.evaluation.moments import Gaussian, Moments


def halves_check(features_ND: Tensor, seed: int = 0) -> float:
    """Fréchet distance between two random halves of one set of images.

    No model can be told from the set itself below this figure at half as many images: it is what
    the finite number of images alone makes. An odd image is left out.

    Raises DataError: fewer than 4 images.
    """
    order = torch.randperm(len(features_ND), generator=torch.Generator().manual_seed(seed))
    half = len(order) // 2
    halves = [
        _gaussian(features_ND[part.to(features_ND.device)])
        for part in (order[:half], order[half : 2 * half])
    ]
    with warnings.catch_warnings():  # that they are few is what this figure shows
        warnings.simplefilter("ignore")
        return frechet_distance(*halves)


def known_pair(dim: int = 256, seed: int = 0) -> tuple[float, float]:
    """(found, right) distance of two Gaussians with the same axes, which the roots alone decide.

    In a random basis with standard deviations a and b along it: |m|^2 + sum of (a - b)^2.
    """
    generator = torch.Generator().manual_seed(seed)
    draw_DD = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    basis_DD, _ = torch.linalg.qr(draw_DD)
    a_D, b_D = 0.1 + torch.rand(2, dim, generator=generator, dtype=torch.float64)
    mean_D = torch.randn(dim, generator=generator, dtype=torch.float64)
    first, second = (
        Gaussian(mean, basis_DD * deviations_D.square() @ basis_DD.T)
        for mean, deviations_D in ((mean_D, a_D), (torch.zeros_like(mean_D), b_D))
    )
    right = mean_D.square().sum() + (a_D - b_D).square().sum()
    return frechet_distance(first, second), right.item()


def _gaussian(features_ND: Tensor) -> Gaussian:
    moments = Moments(features_ND.shape[1], features_ND.device)
    moments.add(features_ND)
    return moments.gaussian()
