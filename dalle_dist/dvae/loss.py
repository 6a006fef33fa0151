"""The dVAE's evidence lower bound: logit-Laplace likelihood and KL to the uniform prior.

Shape suffixes as in `dalle_dist.dvae.model`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PIXEL_MARGIN = 0.1  # keeps mapped pixels off 0 and 1, where the logit is infinite (paper A.3)


def map_pixels(images_BCHW: Tensor) -> Tensor:
    """[0, 1] to [0.1, 0.9]."""
    return (1 - 2 * PIXEL_MARGIN) * images_BCHW + PIXEL_MARGIN


def unmap_pixels(mapped_BCHW: Tensor) -> Tensor:
    """Inverse of `map_pixels`, clamped to [0, 1]."""
    return ((mapped_BCHW - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)).clamp(0, 1)


def logit_laplace_nll(mapped: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """-ln of the logit-Laplace density at `mapped` in (0, 1), elementwise, in nats (paper A.3)."""
    deviation = (torch.logit(mapped) - mu).abs() * torch.exp(-log_b)
    return deviation + log_b + math.log(2) + torch.log(mapped * (1 - mapped))


def kl_to_uniform(logits_BKGG: Tensor) -> Tensor:
    """KL(softmax of the logits || uniform) in nats, summed over the grid: kl_B (paper A.2)."""
    log_q_BKGG = F.log_softmax(logits_BKGG, dim=1)
    kl_BGG = (log_q_BKGG.exp() * log_q_BKGG).sum(dim=1) + math.log(logits_BKGG.shape[1])
    return kl_BGG.sum(dim=(1, 2))


def elb_terms(
    images_BCHW: Tensor, logits_BKGG: Tensor, stats_BSHW: Tensor, nll_beta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(reconstruction nll, KL), both nats per channel value averaged over the batch.

    The loss is nll + weight * KL: both terms carry the paper's division by H * W * 3. The bound
    itself is their sum with weight 1.

    Args:
        nll_beta: the gradient, not the value, of each pixel's nll is multiplied by its b to this
            power. The gradient to mu is 1 / b: plain pixels, whose b falls towards 0, outweigh
            those that are hard to tell, which are given up. At 1 all pull alike (beta-NLL,
            arXiv 2203.09168).
    """
    mu_BCHW, log_b_BCHW = stats_BSHW.chunk(2, dim=1)
    nll_BCHW = logit_laplace_nll(map_pixels(images_BCHW), mu_BCHW, log_b_BCHW)
    if nll_beta and nll_BCHW.requires_grad:
        weight_BCHW = torch.exp(nll_beta * log_b_BCHW.detach())
        nll_BCHW.register_hook(lambda grad_BCHW: grad_BCHW * weight_BCHW)
    return nll_BCHW.mean(), kl_to_uniform(logits_BKGG).mean() / images_BCHW[0].numel()
