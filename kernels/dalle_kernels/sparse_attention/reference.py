"""The oracle: a dense boolean mask into torch's scaled-dot-product attention."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_kernels.masks import AttentionMask


def attention(qkv_BN3HD: Tensor, mask: AttentionMask) -> Tensor:
    """out_BNHD; see `sparse_attention`."""
    q_BHND, k_BHND, v_BHND = qkv_BN3HD.permute(2, 0, 3, 1, 4)
    if mask.is_causal:
        out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, is_causal=True)
    else:
        allowed = _dense(mask, qkv_BN3HD.device)
        out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=allowed)
    return out_BHND.transpose(1, 2)


@lru_cache(maxsize=64)
def _dense(mask: AttentionMask, device: torch.device) -> Tensor:
    return mask.dense().to(device)
