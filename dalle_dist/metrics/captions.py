"""Does the caption help? Image loss with the right captions against captions shuffled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_dist.transformer.model import Transformer


@dataclass(frozen=True)
class CaptionLosses:
    """Nats per image token."""

    right: float
    shuffled: float

    @property
    def gain(self) -> float:
        return self.shuffled - self.right


def caption_losses(
    model: Transformer, text_BT: Tensor, codes_BN: Tensor, *, seed: int = 0, batch_size: int = 64
) -> CaptionLosses:
    """Image loss over a held-out set, with each picture's caption and with another's.

    The shuffle is a seeded cycle, so that no picture keeps its own caption.
    """
    cycle = torch.randperm(len(text_BT), generator=torch.Generator().manual_seed(seed))
    other_BT = torch.empty_like(text_BT)
    other_BT[cycle] = text_BT[cycle.roll(1)]
    right = _image_loss(model, text_BT, codes_BN, batch_size)
    return CaptionLosses(right, _image_loss(model, other_BT, codes_BN, batch_size))


@torch.no_grad()
def _image_loss(model: Transformer, text_BT: Tensor, codes_BN: Tensor, batch_size: int) -> float:
    total, count = 0.0, 0.0
    for text, codes in zip(text_BT.split(batch_size), codes_BN.split(batch_size), strict=True):
        loss = model(text, codes)
        total += float(loss.image_sum)
        count += float(loss.image_count)
    return total / count
