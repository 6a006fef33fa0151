"""Cross-entropies of text and image tokens, as sums and counts.

Sums, because each is averaged over its own tokens of the whole batch (paper 2.2), and how many
text tokens count differs from one part of a batch to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """fp32 scalars, nats; counts are of the targets summed over."""

    text_sum: Tensor
    text_count: Tensor
    image_sum: Tensor
    image_count: Tensor

    def total(self, text_weight: float) -> Tensor:
        """`weighted` of the means over these targets; 0 for the text where none counts."""
        text = self.text_sum / self.text_count.clamp(min=1)
        image = self.image_sum / self.image_count
        return weighted(text, image, text_weight)


Number = TypeVar("Number", float, Tensor)


def weighted(text: Number, image: Number, text_weight: float) -> Number:
    """The loss of stage 2, of the means over text and over image targets (paper 2.2)."""
    return text_weight * text + (1 - text_weight) * image


def cross_entropy_sum(logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """(sum over M targets, M) as fp32 scalars."""
    # A kernel fills it; a copy from the host would wait for all kernels before it.
    count = torch.full((), float(len(targets_M)), device=logits_MV.device)
    return F.cross_entropy(logits_MV, targets_M, reduction="sum"), count
