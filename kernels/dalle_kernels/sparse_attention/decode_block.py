"""Attention of several image tokens per sample at once, each sample at a position of its own.

What guesses of tokens need: a token's key and value replace those of an earlier guess at its
position, and samples advance by different numbers of tokens.

Masks in raster order have a ring with room for the block beyond what a query looks back to, so
that no guess replaces a key that is still needed. Masks by column keep all columns, and a query
looks at its own. Positions from the end of the image on are no tokens: they see themselves alone,
so that a sample that is finished can wait for the others.

Shape suffixes: C captions, B samples of all captions, W positions of the block, H heads, D head
width, T text tokens, J slots that a query looks at, P positions and the block after the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention.caption_text import CaptionCache


class BlockCache(CaptionCache):
    """One layer's keys and values while images are generated `block` tokens at a time.

    Arguments and errors are those of `CaptionCache`.

    Args:
        block: image tokens of a call.
    """

    def __init__(self, mask: AttentionMask, samples: Sequence[int], block: int) -> None:
        super().__init__(mask, samples)
        if block < 1:
            raise ValueError(f"block: {block} is below 1")
        self.block = block
        if mask.rule.by_column:
            self.slots = mask.image + math.ceil(block / mask.grid) * mask.grid
        else:
            self.slots = self.span.window + block

    def put_text(self, k_CHTD: Tensor, v_CHTD: Tensor) -> None:
        super().put_text(k_CHTD, v_CHTD)
        # Slots that no token has had yet are multiplied by weights of 0, which must stay 0.
        self.k_BHJD.zero_()
        self.v_BHJD.zero_()

    def slot(self, position: int) -> int:
        return _slot(self.mask, self.slots, position)

    def extend(self, first_B: Tensor, q_BWHD: Tensor, k_BWHD: Tensor, v_BWHD: Tensor) -> Tensor:
        """out_BWHD of the image tokens at raster positions first to first + W - 1 of each sample.

        Their keys and values are put into the cache before. A sample's `first` is at most W more
        than in its last call, and not less; the number of image tokens once it is finished.

        Raises:
            ValueError: another number of positions than the block's, or no text yet.
        """
        self._check_text()
        if q_BWHD.shape[1] != self.block:
            raise ValueError(f"q: {q_BWHD.shape[1]} positions are not the block's {self.block}")
        slot_P, bias_PJ = _tables(self.mask, self.slots, self.block, q_BWHD.device)
        position_BW = first_B[:, None] + torch.arange(self.block, device=first_B.device)
        slot_BW, bias_BWJ = slot_P[position_BW], bias_PJ[position_BW]
        sample_B1 = torch.arange(len(first_B), device=first_B.device)[:, None]
        self.k_BHJD[sample_B1, :, slot_BW] = k_BWHD
        self.v_BHJD[sample_B1, :, slot_BW] = v_BWHD
        return self._attend(q_BWHD, bias_BWJ, sample_B1, slot_BW)

    def _attend(
        self, q_BWHD: Tensor, bias_BWJ: Tensor, sample_B1: Tensor, slot_BW: Tensor
    ) -> Tensor:
        # Scores and their softmax in fp32 at least, as in the fused kernels.
        exact = torch.promote_types(q_BWHD.dtype, torch.float32)
        q_BWHD = q_BWHD.to(exact) * (1 / math.sqrt(q_BWHD.shape[-1]))
        keys, values = (self._looked_at(x, sample_B1, slot_BW) for x in (self.k_BHJD, self.v_BHJD))
        image_BWHJ = _product(q_BWHD, keys.to(exact).transpose(-1, -2)) + bias_BWJ[:, :, None]
        text_BWHT = self._of_text(q_BWHD, self.k_CHTD.to(exact).transpose(-1, -2))
        weights = torch.cat([text_BWHT, image_BWHJ], dim=-1).softmax(dim=-1)
        text_BWHT, image_BWHJ = weights.split([self.mask.text, image_BWHJ.shape[-1]], dim=-1)
        out_BWHD = self._of_text(text_BWHT, self.v_CHTD.to(exact))
        return (out_BWHD + _product(image_BWHJ, values.to(exact))).to(self.v_BHJD.dtype)

    def _of_text(self, x_BWHn: Tensor, y_CHnm: Tensor) -> Tensor:
        rows = self._per_caption(x_BWHn.flatten(0, 1), y_CHnm)
        return rows.unflatten(0, x_BWHn.shape[:2])

    def _looked_at(self, x_BHJD: Tensor, sample_B1: Tensor, slot_BW: Tensor) -> Tensor:
        """The ring, [B, H, J, D]; or each query's column, [B, W, H, J, D]."""
        if not self.mask.rule.by_column:
            return x_BHJD
        lines = x_BHJD.unflatten(2, (-1, self.mask.grid))
        return lines[sample_B1, :, slot_BW // self.mask.grid]


def _product(x_BWHn: Tensor, y: Tensor) -> Tensor:
    """Rows times their sample's matrix [B, H, n, m], or their own [B, W, H, n, m]: [B, W, H, m]."""
    if y.ndim == 5:
        return (x_BWHn[:, :, :, None] @ y)[:, :, :, 0]
    return (x_BWHn.transpose(1, 2) @ y).transpose(1, 2)


def _slot(mask: AttentionMask, slots: int, position: int) -> int:
    if not mask.rule.by_column:
        return position % slots
    return mask.scan(position) if position < mask.image else position


# Kept for later calls, so never inference tensors, which autograd would refuse.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _tables(
    mask: AttentionMask, slots: int, block: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """slot_P of each position; bias_PJ: 0 where a slot that it looks at may be seen, else -inf."""
    positions = range(mask.image + block)
    slot_P = torch.tensor([_slot(mask, slots, p) for p in positions])
    shown = mask.grid if mask.rule.by_column else slots
    bias_PJ = torch.full((len(positions), shown), -torch.inf)
    bias_PJ[positions, slot_P % shown] = 0
    scan = torch.tensor([mask.scan(p) for p in range(mask.image)])
    for line in torch.arange(mask.image).split(mask.grid):  # all pairs at once take gigabytes
        scanned = scan[line]
        query, key = mask.visible(scanned[:, None], torch.arange(mask.image)[None]).nonzero().T
        bias_PJ[line[query], key % shown] = 0
    return slot_P.to(device), bias_PJ.to(device)
