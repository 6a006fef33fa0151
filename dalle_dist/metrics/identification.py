"""Identification: is an image that was sampled for a caption nearest to the caption's true image?

Chance finds 1 of the images compared, whatever the model has learnt of images alone. Beside it: the
nearest of other images, such as those trained on. A sample that equals one of them is a copy.

Shape suffixes: B samples, M images compared with, C channels, H and W pixels, X all values of an
image, T text positions, N image tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dalle_dist.generate.sampler import sample_codes
from dalle_dist.image_tokenizer.protocol import ImageTokenizer
from dalle_dist.transformer.protocol import TextImageTransformer


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


def distances(images_BCHW: Tensor, others_MCHW: Tensor) -> Tensor:
    """Sum of squares over pixels and channels between 8-bit images, exact: distances_BM, float64.

    `images_BCHW` and `others_MCHW` are uint8, or those integers as floats.
    """
    images_BX, others_MX = images_BCHW.double().flatten(1), others_MCHW.double().flatten(1)
    # All sums are integers that float64 holds, so that products are as exact as differences.
    squares_B, squares_M = images_BX.square().sum(dim=1), others_MX.square().sum(dim=1)
    return squares_B[:, None] + squares_M - 2 * images_BX @ others_MX.T


def nearest(images_BCHW: Tensor, others: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """(indices_B int64, distances_B float64) of the nearest other image to each, by `distances`.

    The first of those that are equally near. -1 and infinity where there is no other.

    Args:
        images_BCHW: uint8.
        others: others_MCHW, uint8, chunk by chunk; indices count through all chunks.
    """
    images_BCHW = images_BCHW.double()
    index_B = torch.full((len(images_BCHW),), -1, device=images_BCHW.device)
    least_B = torch.full(index_B.shape, torch.inf, dtype=torch.float64, device=index_B.device)
    start = 0
    for others_MCHW in others:
        distances_BM = distances(images_BCHW, others_MCHW)
        at_B = distances_BM.argmin(dim=1)  # the first of several; `min` leaves open which
        found_B = distances_BM.gather(1, at_B[:, None])[:, 0]
        nearer_B = found_B < least_B
        index_B = torch.where(nearer_B, start + at_B, index_B)
        least_B = torch.where(nearer_B, found_B, least_B)
        start += len(others_MCHW)
    return index_B, least_B


def summary(ranks_B: Tensor) -> dict[str, float]:
    """`r1` and `r10`, shares of ranks up to 1 and 10, and `rank`, the median."""
    return {
        "r1": (ranks_B <= 1).double().mean().item(),
        "r10": (ranks_B <= 10).double().mean().item(),
        "rank": float(statistics.median(ranks_B.tolist())),
    }


@torch.no_grad()
def sample_images(
    model: TextImageTransformer,
    image_tokenizer: ImageTokenizer,
    text_BT: Tensor,
    seeds: Sequence[int],
    batch_size: int = 64,
    kept_codes: Tensor | None = None,
) -> Tensor:
    """One decoded image for each caption, on the CPU: images_BCHW in [0, 1].

    By the sampling options of the model's config; `kept_codes` as in `sample_codes`.
    """
    images = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        kept_BN = None if kept_codes is None else kept_codes[part]
        codes_BN = sample_codes(model, text_BT[part], seeds[part], kept_codes=kept_BN)
        images.append(image_tokenizer.decode(codes_BN).cpu())
    return torch.cat(images)
