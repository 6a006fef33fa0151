"""Completion: is the lower part of an image that was generated below its upper part its own?

The paper's image-to-image (3.3): the first rows of tokens are given, the others are sampled.

Shape suffixes: B images, T text positions, N image tokens, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle_dist.config import Config
from dalle_dist.generate.sampler import FREE
from dalle_dist.image_tokenizer.protocol import ImageTokenizer
from dalle_dist.metrics.identification import identify, sample_images
from dalle_dist.transformer.protocol import TextImageTransformer


def rows_kept(config: Config) -> int:
    """Rows of tokens that the measure gives: `train.completion_rows`, or the upper half."""
    return config.train.completion_rows or config.transformer.image_grid // 2


def complete_images(
    model: TextImageTransformer,
    image_tokenizer: ImageTokenizer,
    text_BT: Tensor,
    codes_BN: Tensor,
    seeds: Sequence[int],
    rows: int,
) -> Tensor:
    """One completion of each image, decoded, on the CPU: images_BCHW in [0, 1].

    By the sampling options of the model's config.

    Args:
        codes_BN: of the true images; the first `rows` rows are kept.
    """
    kept_N = torch.arange(codes_BN.shape[1], device=codes_BN.device) < rows * image_tokenizer.grid
    kept_BN = torch.where(kept_N, codes_BN, FREE)
    return sample_images(model, image_tokenizer, text_BT, seeds, kept_codes=kept_BN)


def completion_ranks(completed_BCHW: Tensor, true_BCHW: Tensor, share: float) -> Tensor:
    """`identify` of what lies below the first `share` of each image: ranks_B, int64."""
    top = round(share * true_BCHW.shape[2])
    return identify(completed_BCHW[:, :, top:], true_BCHW[:, :, top:])
