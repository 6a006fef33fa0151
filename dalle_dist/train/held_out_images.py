"""Measures of stage 1 on held-out images, the work shared by all ranks.

Shape suffixes: B batch, C channels, H and W pixels, G codes per side, K codebook entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_dist.config import DVAEConfig
from dalle_dist.data.image_dataset import ImageDataset
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.dvae.model import DVAE
from dalle_dist.metrics.codes import code_counts, entropy, share_in_use
from dalle_dist.metrics.reconstruction import psnr, reconstruct, ssim
from dalle_dist.train.state import TrainingState

MEASURED = 512  # held-out images of one evaluation, at most
BATCH = 64
COLLAPSED = 0.5  # share of the run's best value below which its codes count as collapsed
START_AGAIN = (
    "start stage 1 again with dvae_train.nll_beta=1, dvae_train.clip=1, a shorter "
    "dvae_train.kl_steps or a lower dvae_train.lr (docs/recipe.md)"
)


class HeldOutImages:
    """The first held-out images; each rank reads and measures its share of them."""

    def __init__(self, dataset: ImageDataset, ranks: Ranks) -> None:
        mine = range(ranks.rank, min(MEASURED, len(dataset)), ranks.world)
        self._mine = [
            image_stack(dataset, mine[start : start + BATCH])
            for start in range(0, len(mine), BATCH)
        ]
        self._ranks = ranks

    def measure(self, dvae: DVAE) -> dict[str, float]:
        """`psnr` (dB) and `ssim`, means over images; `codes_in_use`, a share of the codebook;
        `codes_entropy` (nats) and `codes_perplexity`. A collective call.

        Args:
            dvae: the same on all ranks.
        """
        sums = torch.zeros(3, dtype=torch.float64)
        counts_K = torch.zeros(dvae.config.codebook_size, dtype=torch.int64)
        for images_BCHW in self._mine:
            images_BCHW = images_BCHW.to(self._ranks.device).float() / 255
            codes_BGG, decoded_BCHW = reconstruct(dvae, images_BCHW)
            quality = psnr(images_BCHW, decoded_BCHW), ssim(images_BCHW, decoded_BCHW)
            sums += torch.tensor([*(q_B.sum().item() for q_B in quality), len(images_BCHW)])
            counts_K += code_counts(codes_BGG, len(counts_K)).cpu()
        total_psnr, total_ssim, images, *counts = self._ranks.sum(
            [*sums.tolist(), *map(float, counts_K.tolist())]
        )
        nats = entropy(torch.tensor(counts))
        return {
            "psnr": total_psnr / images,
            "ssim": total_ssim / images,
            "codes_in_use": share_in_use(torch.tensor(counts)),
            "codes_entropy": nats,
            "codes_perplexity": math.exp(nats),
        }


def averaged_dvae(config: DVAEConfig, state: TrainingState) -> DVAE:
    """The dVAE of the averaged weights, on every rank's device; a collective call."""
    averaged, ranks = state.averaged_weights(), state.ranks
    with torch.device("meta"):
        dvae = DVAE(config)
    dvae.to_empty(device=ranks.device)
    if averaged is not None:
        dvae.load_state_dict(averaged)
    for weights in dvae.state_dict().values():
        ranks.broadcast_tensor(weights)
    return dvae.eval()


def collapse(
    step: int, now: Mapping[str, float], log: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float], str]:
    """Whether the codes have collapsed: (`codes_collapsed` for the log, one line or "").

    They have when their perplexity, or the share of them in use, is below half of the highest value
    of any evaluation before.

    Args:
        now: what `HeldOutImages.measure` found after this step.
        log: the run's lines so far.
    """
    names = {"codes_perplexity": "perplexity", "codes_in_use": "share of codes in use"}
    best = {name: max((line[name] for line in log if name in line), default=0.0) for name in names}
    fallen = [name for name in names if now[name] < COLLAPSED * best[name]]
    if not fallen:
        return {"codes_collapsed": 0.0}, ""
    told = ", ".join(f"{names[name]} {now[name]:.3g}, was {best[name]:.3g}" for name in names)
    return {"codes_collapsed": 1.0}, f"step {step:,}: THE CODES COLLAPSE: {told}; {START_AGAIN}"


def image_stack(dataset: ImageDataset, indices: range) -> Tensor:
    """Images of a data set, uint8: images_BCHW."""
    return torch.stack([dataset[i].image_CHW for i in indices])
