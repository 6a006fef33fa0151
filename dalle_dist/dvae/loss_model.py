"""The dVAE with its loss, its first biases and its noise: what training adds to the model.

Shape suffixes as in `dalle_dist.dvae.model`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_dist.config import DVAEConfig
from dalle_dist.dvae.loss import elb_terms, map_pixels
from dalle_dist.dvae.model import CHANNELS, DVAE


class LossDVAE(DVAE):
    """The dVAE whose forward pass gives its two loss terms as one tensor.

    Args:
        bf16: compute under bf16 autocast; the weights stay as they are.
        nll_beta: see `elb_terms`.
    """

    def __init__(self, config: DVAEConfig, bf16: bool = False, nll_beta: float = 0.0) -> None:
        super().__init__(config)
        self._bf16, self._nll_beta = bf16, nll_beta

    def forward(  # type: ignore[override]
        self, images_BCHW: Tensor, gumbel_BKGG: Tensor, temperature: float
    ) -> Tensor:
        """Reconstruction nll and KL, nats per channel value, means over this batch."""
        device = images_BCHW.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._bf16):
            logits_BKGG, stats_BSHW = super().forward(images_BCHW, gumbel_BKGG, temperature)
        return torch.stack(elb_terms(images_BCHW, logits_BKGG, stats_BSHW, self._nll_beta))


@torch.no_grad()
def start_at_data(dvae: DVAE, images_BCHW: Tensor) -> None:
    """Set the output biases to the likelihood's optimum for a constant image.

    The mean and spread of the channels then need not be learnt through the deep decoder, which is
    what short runs spend their first hundreds of steps on. Weights keep the paper's distribution.
    """
    logits_BCHW = torch.logit(map_pixels(images_BCHW))
    median_C = logits_BCHW.transpose(0, 1).flatten(1).median(dim=1).values
    spread_C = (logits_BCHW - median_C[:, None, None]).abs().mean(dim=(0, 2, 3))
    output: Any = dvae.decoder.output
    bias = output.bias
    bias[:CHANNELS] = median_C
    bias[CHANNELS:] = spread_C.clamp_min(1e-2).log()


def gumbel_noise(
    shape: tuple[int, ...], seed: int, positions: Sequence[int], device: torch.device
) -> Tensor:
    """Standard Gumbel noise, each sample's own by (seed, position): noise_B... of `shape`.

    The same whichever rank samples it, so that runs do not depend on the number of ranks.
    """
    generator = torch.Generator(device)
    uniform = torch.empty(len(positions), *shape, device=device)
    for row, position in zip(uniform, positions, strict=True):
        digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=4).digest()
        row.uniform_(generator=generator.manual_seed(int.from_bytes(digest, "big")))
    return uniform.clamp_min_(1e-20).log_().neg_().log_().neg_()
