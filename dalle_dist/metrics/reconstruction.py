"""How well a dVAE reconstructs images from the hard codes that stage 2 will see."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_dist.dvae.model import DVAE


def psnr(images_BCHW: Tensor, reconstructed_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in [0, 1]: psnr_B, dB."""
    error_B = (images_BCHW - reconstructed_BCHW).double().square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error_B.clamp_min(1e-10))


@torch.no_grad()
def reconstruct(dvae: DVAE, images_BCHW: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """(codes_BGG, images_BCHW) of images in [0, 1] through the likeliest codes."""
    codes = [dvae.codes(batch) for batch in images_BCHW.split(batch_size)]
    return torch.cat(codes), torch.cat([dvae.decode(batch) for batch in codes])


def share_in_use(codes: Tensor, codebook_size: int) -> float:
    """Share of the codebook that occurs in `codes` at all."""
    return len(codes.unique()) / codebook_size
