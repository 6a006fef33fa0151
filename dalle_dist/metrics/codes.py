"""Which codes an image tokenizer uses, and how evenly.

Shape suffix: K codebook entries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def code_counts(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs in `codes` of any shape: counts_K, int64."""
    return torch.bincount(codes.flatten(), minlength=codebook_size)


def share_in_use(counts_K: Tensor) -> float:
    """Share of the codebook that occurs at all."""
    return (counts_K > 0).double().mean().item()


def entropy(counts_K: Tensor) -> float:
    """Entropy of the codes, nats: ln K where all are equally frequent, 0 where only one occurs.

    Its exponential is the perplexity: how many equally frequent codes would be as varied.
    """
    shares_K = counts_K.double() / counts_K.sum()
    return torch.special.entr(shares_K).sum().item()
