"""Cross-entropies per token on pairs that the transformer was not trained on.

Shape suffixes: B batch, T text positions, N image tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dalle_dist.data.token_dataset import TokenDataset, collate_tokens
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.interface import Engine

MOST = 2_048  # held-out samples per evaluation


@torch.no_grad()
def held_out_losses(
    engine: Engine,
    dataset: TokenDataset,
    micro_batch: int,
    ranks: Ranks,
    caption_of: Callable[[int], int] | None = None,
) -> tuple[float, float]:
    """Nats per text token and per image token over the held-out set; all ranks share the work.

    The first is 0 where all captions are empty.

    Every rank makes the same number of forward passes, as ZeRO-3 gathers weights in each.

    Args:
        caption_of: whose caption each sample gets, by index; None: its own.
    """
    sums = [0.0, 0.0, 0.0, 0.0]
    count = min(MOST, len(dataset))
    engine.module.eval()
    for first in range(0, count, ranks.world * micro_batch):
        start = first + ranks.rank * micro_batch
        mine = range(start, min(start + micro_batch, count))
        text_BT, codes_BN = _batch(dataset, mine or range(1), caption_of)
        parts = engine(text_BT.to(ranks.device), codes_BN.to(ranks.device)).tolist()
        if mine:
            sums = [total + part for total, part in zip(sums, parts, strict=True)]
    engine.module.train()
    text, texts, image, images = ranks.sum(sums)
    return text / max(texts, 1), image / images


def _batch(
    dataset: TokenDataset, indices: range, caption_of: Callable[[int], int] | None
) -> tuple[Tensor, Tensor]:
    text_BT, codes_BN, _ = collate_tokens([dataset[i] for i in indices])
    if caption_of is not None:
        text_BT = torch.stack([dataset[caption_of(i)].text for i in indices])
    return text_BT, codes_BN
