"""The symmetric contrastive loss (arXiv 2103.00020, 2.3 and Figure 3) on this rank's rows.

Shape suffixes: B pairs of this rank, N pairs of all ranks, D features.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy


def contrastive_loss(
    both_B2D: Tensor, both_N2D: Tensor, captions_B: Tensor, captions_N: Tensor, scale: Tensor
) -> Tensor:
    """Sum over this rank's pairs, in nats; summed over ranks and divided by N: the batch's loss.

    Each image picks its caption among those of all pairs, and each caption its image; the two count
    half each. Pairs whose captions are the same are not told apart: what is no mistake is not
    taught as one. (The paper takes them for different ones.)

    Args:
        both_B2D, both_N2D: features of length 1, of images and of captions; this rank's are a part
            of all, at its rank's place.
        captions_B, captions_N: numbers that are the same for the same caption.
        scale: factor on the cosines.
    """
    first = dist.get_rank() * len(both_B2D) if len(both_N2D) > len(both_B2D) else 0
    own_B = torch.arange(first, first + len(both_B2D), device=both_B2D.device)
    alike_BN = captions_B[:, None] == captions_N
    alike_BN[torch.arange(len(own_B), device=own_B.device), own_B] = False
    (image_BD, text_BD), (image_ND, text_ND) = both_B2D.unbind(1), both_N2D.unbind(1)
    losses = [
        cross_entropy(
            (scale * rows_BD @ others_ND.T).masked_fill(alike_BN, -torch.inf),
            own_B,
            reduction="sum",
        )
        for rows_BD, others_ND in ((image_BD, text_ND), (text_BD, image_ND))
    ]
    return (losses[0] + losses[1]) / 2
