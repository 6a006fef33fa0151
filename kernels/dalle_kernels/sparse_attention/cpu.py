"""Attention that computes text keys once and, among image keys, only what the mask can allow.

An image query sees all text, so its scores are two blocks under one softmax: a dense one over the
text and a small one over a window of image keys. The window is the own line and the lines above
it that the mask reaches (row, conv), or the own column (column). No N x N matrix is built.

Shape suffixes: B batch, H heads, D head width, T text, R image rows, C image columns, W keys of a
window; S all states.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_kernels.masks import AttentionMask


def pays(mask: AttentionMask) -> bool:
    """Whether a window is clearly smaller than the image, so that cutting it out is worth it."""
    return mask.kind != "causal" and mask.grid >= 8 and _lines(mask) * 2 <= mask.grid


def attention(qkv_BN3HD: Tensor, mask: AttentionMask) -> Tensor:
    """out_BNHD; see `sparse_attention`."""
    q_BHSD, k_BHSD, v_BHSD = qkv_BN3HD.permute(2, 0, 3, 1, 4)
    text, side = mask.text, mask.grid
    k_BHTD, v_BHTD = k_BHSD[:, :, :text], v_BHSD[:, :, :text]
    text_out = F.scaled_dot_product_attention(q_BHSD[:, :, :text], k_BHTD, v_BHTD, is_causal=True)

    q_BHRCD, k_BHRCD, v_BHRCD = (
        x[:, :, text:].unflatten(2, (side, side)) for x in (q_BHSD, k_BHSD, v_BHSD)
    )
    if mask.kind == "column":
        q_BHRCD, k_BHRWD, v_BHRWD = (x.transpose(2, 3) for x in (q_BHRCD, k_BHRCD, v_BHRCD))
    else:
        k_BHRWD, v_BHRWD = (_windows(x, _lines(mask)) for x in (k_BHRCD, v_BHRCD))

    q_BHRCD = q_BHRCD * (1 / math.sqrt(q_BHSD.shape[-1]))
    hidden_RCW = _hidden(mask, qkv_BN3HD.device)
    near_BHRCW = (q_BHRCD @ k_BHRWD.transpose(-1, -2)).masked_fill(hidden_RCW, -math.inf)
    far_BHST = q_BHRCD.flatten(2, 3) @ k_BHTD.transpose(-1, -2)
    weights = torch.cat([far_BHST, near_BHRCW.flatten(2, 3)], dim=-1).softmax(dim=-1)
    far_BHST, near_BHSW = weights.split([text, hidden_RCW.shape[-1]], dim=-1)
    near_BHRCD = near_BHSW.unflatten(2, (side, side)) @ v_BHRWD
    out_BHRCD = near_BHRCD + (far_BHST @ v_BHTD).unflatten(2, (side, side))
    if mask.kind == "column":
        out_BHRCD = out_BHRCD.transpose(2, 3)
    return torch.cat([text_out, out_BHRCD.flatten(2, 3)], dim=2).transpose(1, 2)


def _lines(mask: AttentionMask) -> int:
    """Lines of a query's window: its own, and those above that its mask can reach."""
    if mask.kind == "column":
        return 1
    return 1 + _reach(mask)


@lru_cache(maxsize=64)
def _reach(mask: AttentionMask) -> int:
    line = torch.arange(mask.image, device="cpu") // mask.grid
    return int(((line[:, None] - line[None, :]) * mask.image_part()).max())


def _windows(x_BHRCD: Tensor, lines: int) -> Tensor:
    """Each row's window of `lines` lines, oldest first, zeros above the picture: x_BHRWD."""
    padded = F.pad(x_BHRCD, (0, 0, 0, 0, lines - 1, 0))
    return torch.cat([padded[:, :, i : i + x_BHRCD.shape[2]] for i in range(lines)], dim=3)


# Kept for later calls, so never an inference tensor, which autograd would refuse.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _hidden(mask: AttentionMask, device: torch.device) -> Tensor:
    """bool hidden_RCW: keys of each query's window that it may not look at."""
    side = mask.grid
    part = mask.image_part().view(side, side, side, side)  # query row, column; key row, column
    if mask.kind == "column":
        later = torch.ones(side, side, dtype=torch.bool, device=device).triu(1)
        return later.expand(side, side, side)
    lines = _lines(mask)
    allowed = torch.zeros(side, side, lines, side, dtype=torch.bool, device="cpu")
    for row in range(side):
        for line in range(lines):
            above = row - (lines - 1) + line
            if above >= 0:
                allowed[row, :, line] = part[row, :, above]
    return ~allowed.flatten(2).to(device)
