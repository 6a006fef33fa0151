"""PSNR and SSIM against plain re-statements of their definitions."""

import math

import numpy as np
import pytest
import torch

from dalle_dist.metrics.reconstruction import psnr, ssim


def plain_ssim(x_HW, y_HW, size):
    """Wang et al. 2004, (5) to (14) with alpha = beta = gamma = 1: a window at a time."""
    middle, c1, c2 = size // 2, 0.01**2, 0.03**2
    weights = np.array(
        [
            [math.exp(-((i - middle) ** 2 + (j - middle) ** 2) / (2 * 1.5**2)) for j in range(size)]
            for i in range(size)
        ]
    )
    weights /= weights.sum()
    found = []
    for top in range(x_HW.shape[0] - size + 1):
        for left in range(x_HW.shape[1] - size + 1):
            x, y = (a[top : top + size, left : left + size] for a in (x_HW, y_HW))
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            both = (weights * (x - mx) * (y - my)).sum()
            found.append(
                (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
            )
    return np.mean(found)


@pytest.mark.parametrize(
    ("height", "width", "window"), [(16, 13, 11), (11, 11, 11), (8, 8, 7), (9, 20, 9), (1, 1, 1)]
)
def test_ssim_is_that_of_the_paper(height, width, window):
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(3, 3, height, width, generator=generator)
    other = (images + 0.2 * torch.rand(images.shape, generator=generator)).clamp_max(1)
    expected = [
        np.mean([plain_ssim(x, y, window) for x, y in zip(a, b, strict=True)])
        for a, b in zip(images.double().numpy(), other.double().numpy(), strict=True)
    ]
    assert ssim(images, other).tolist() == pytest.approx(expected, rel=1e-9)
    assert ssim(images, images).tolist() == pytest.approx([1, 1, 1])


def test_psnr_is_of_each_image():
    images = torch.zeros(2, 3, 4, 4)
    other = images.clone()
    other[1] += 0.1
    assert psnr(images, other).tolist() == pytest.approx([100, 20])
