"""Identification: is an image that was sampled for a caption nearest to the caption's true image?

Chance finds 1 of the images compared, whatever the model has learnt of images alone.

Shape suffixes: B samples, C channels, H and W pixels, T text positions, N image tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from dalle_dist.generate.sampler import sample_codes
from dalle_dist.image_tokenizer.protocol import ImageTokenizer
from dalle_dist.transformer.model import Transformer


def identify(generated_BCHW: Tensor, true_BCHW: Tensor) -> Tensor:
    """Rank of each caption's true image among all true images, by distance: ranks_B, int64.

    The distance is the sum of squares over pixels and channels. 1: none is as near to the generated
    image as its own; another that is exactly as near counts as nearer.
    """
    true_BX = true_BCHW.double().flatten(1)
    ranks = []
    for own, image_X in enumerate(generated_BCHW.double().flatten(1)):
        # Image by image: differences are exact where images are equal, which products are not.
        distance_B = (true_BX - image_X).square().sum(dim=1)
        ranks.append((distance_B <= distance_B[own]).sum())
    return torch.stack(ranks)


def summary(ranks_B: Tensor) -> dict[str, float]:
    """`r1` and `r10`, shares of ranks up to 1 and 10, and `rank`, the median."""
    return {
        "r1": (ranks_B <= 1).double().mean().item(),
        "r10": (ranks_B <= 10).double().mean().item(),
        "rank": float(statistics.median(ranks_B.tolist())),
    }


@torch.no_grad()
def sample_images(
    model: Transformer,
    image_tokenizer: ImageTokenizer,
    text_BT: Tensor,
    seeds: Sequence[int],
    batch_size: int = 64,
) -> Tensor:
    """One decoded image for each caption, on the CPU: images_BCHW in [0, 1].

    By the sampling options of the model's config.
    """
    images = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        codes_BN = sample_codes(model, text_BT[part], seeds[part])
        images.append(image_tokenizer.decode(codes_BN).cpu())
    return torch.cat(images)
