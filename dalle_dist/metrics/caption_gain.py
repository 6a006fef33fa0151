"""Caption gain: the image loss with another image's captions, less that with the right ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_dist.transformer.protocol import TextImageTransformer


@dataclass(frozen=True)
class CaptionLosses:
    """Nats per image token."""

    right: float
    shuffled: float

    @property
    def gain(self) -> float:
        return self.shuffled - self.right


def caption_cycle(count: int, seed: int) -> Tensor:
    """Whose caption each of `count` images gets: a seeded cycle, so that none keeps its own."""
    cycle = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(cycle)
    other[cycle] = cycle.roll(1)
    return other


def caption_losses(
    model: TextImageTransformer,
    text_BT: Tensor,
    codes_BN: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> CaptionLosses:
    """Image loss over a held-out set, with each image's caption and with another's."""
    other_BT = text_BT[caption_cycle(len(text_BT), seed)]
    right = _image_loss(model, text_BT, codes_BN, batch_size)
    return CaptionLosses(right, _image_loss(model, other_BT, codes_BN, batch_size))


@torch.no_grad()
def _image_loss(
    model: TextImageTransformer, text_BT: Tensor, codes_BN: Tensor, batch_size: int
) -> float:
    total, count = 0.0, 0.0
    for text, codes in zip(text_BT.split(batch_size), codes_BN.split(batch_size), strict=True):
        loss = model(text, codes)
        total += float(loss.image_sum)
        count += float(loss.image_count)
    return total / count
