"""How well a dVAE reconstructs images from the hard codes that stage 2 will see.

Shape suffixes: B batch, C channels, H and W pixels, G codes per side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_dist.dvae.model import DVAE

WINDOW, SIGMA = 11, 1.5  # pixels
STABILIZERS = 0.01**2, 0.03**2  # C1 and C2, for values in [0, 1]


def psnr(images_BCHW: Tensor, reconstructed_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in [0, 1]: psnr_B, dB."""
    error_B = (images_BCHW - reconstructed_BCHW).double().square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error_B.clamp_min(1e-10))


def ssim(images_BCHW: Tensor, reconstructed_BCHW: Tensor) -> Tensor:
    """Structural similarity of each image in [0, 1]: ssim_B, 1 where the two are equal.

    Wang et al. 2004: means, variances and covariance under a Gaussian window of 11 pixels and
    deviation 1.5, wherever it lies wholly in the image; the mean over places and channels. An image
    of fewer pixels per side gets the largest odd window that fits.
    """
    x_BCHW, y_BCHW = images_BCHW.double(), reconstructed_BCHW.double()
    side = min(WINDOW, x_BCHW.shape[2], x_BCHW.shape[3])
    weights = _gaussian(side - 1 + side % 2).to(x_BCHW.device)
    x, y = _blur(x_BCHW, weights), _blur(y_BCHW, weights)
    xx = _blur(x_BCHW.square(), weights) - x.square()
    yy = _blur(y_BCHW.square(), weights) - y.square()
    xy = _blur(x_BCHW * y_BCHW, weights) - x * y
    c1, c2 = STABILIZERS
    luminance = (2 * x * y + c1) / (x.square() + y.square() + c1)
    return (luminance * (2 * xy + c2) / (xx + yy + c2)).mean(dim=(1, 2, 3))


@torch.no_grad()
def reconstruct(dvae: DVAE, images_BCHW: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """(codes_BGG, images_BCHW) of images in [0, 1] through the likeliest codes."""
    codes = [dvae.codes(batch) for batch in images_BCHW.split(batch_size)]
    return torch.cat(codes), torch.cat([dvae.decode(batch) for batch in codes])


def _gaussian(size: int) -> Tensor:
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    return weights / weights.sum()


def _blur(x_BCHW: Tensor, weights: Tensor) -> Tensor:
    """Weighted means of each channel under the window, down the columns and along the rows."""
    x_PHW = x_BCHW.flatten(0, 1)[:, None]
    x_PHW = F.conv2d(F.conv2d(x_PHW, weights[None, None, :, None]), weights[None, None, None, :])
    return x_PHW[:, 0].unflatten(0, x_BCHW.shape[:2])
