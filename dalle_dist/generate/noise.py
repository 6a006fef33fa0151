"""The random numbers of samples: a function of (seed, position, code), whatever is computed beside.

A token is the code of the highest logit plus Gumbel noise of its own, which is one sample of the
softmax (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030). So a token is a fixed function of what
stands before it: guesses that turn out right give the tokens that generating one by one gives.

Numbers come from SplitMix64 (Steele et al. 2014), a hash of 64-bit integers, the same bits on every
device; the logarithms after it are those of the device.

Shape suffixes: M pairs of seed and position, K codebook entries.
"""

from __future__ import annotations

import torch
from dalle_kernels import generation
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def gumbel(seed_M: Tensor, position_M: Tensor, codebook_size: int) -> Tensor:
    """Standard Gumbel noise_MK, fp32, on the arguments' device.

    `seed_M` and `position_M` are int64; all bits of a seed count.
    """
    if generation.runs_on(seed_M.device):
        return generation.gumbel(seed_M, position_M, codebook_size)
    key_M = _mix(_mix(seed_M * _signed(GOLDEN)) + position_M * _signed(GOLDEN))
    code_K = torch.arange(1, codebook_size + 1, device=seed_M.device) * _signed(GOLDEN)
    bits_MK = _mix(key_M[:, None] + code_K)
    # 53 bits, so that the upper tail, which decides, is as fine as fp32; below 1, so that no code
    # has -inf.
    share_MK = (_shifted(bits_MK, 11).float() + 0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-24)
    return share_MK.neg_().log1p_().neg_().log_().neg_()


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _signed(MIX_1)
    z = (z ^ _shifted(z, 27)) * _signed(MIX_2)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Right by `bits`, zeros following: torch's own shift repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant
