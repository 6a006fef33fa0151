"""Bit operations on fp32 words, on any device: what the Triton kernels are compared with.

An arithmetic shift by 31 turns "is negative" into a mask of ones. Comparisons and masked fills say
the same, but take four times as long on CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_kernels.minifloat.formats import LOWEST_EXPONENT, Format

SIGN = 1 << 15


def pack(x: Tensor, fmt: Format) -> Tensor:
    """uint16 words of the fp32 tensor x."""
    # NaN becomes the largest value here; as a word it would sort by its sign.
    word = x.nan_to_num(nan=16.0).view(torch.int32)
    # Without a sign bit, negatives stay negative words, and are clamped to the word 0.
    magnitude = word & 0x7FFFFFFF if fmt.signed else word
    # Half an ulp never carries into a 65th exponent: it is added after the saturation.
    code = magnitude.clamp(LOWEST_EXPONENT << 23, fmt.largest).add_(1 << fmt.dropped - 1)
    code.bitwise_right_shift_(fmt.dropped).sub_(LOWEST_EXPONENT << fmt.mantissa)
    kept = torch.rsub(magnitude, fmt.least - 1).bitwise_right_shift_(31)
    if fmt.signed:
        code.bitwise_or_((word >> 16).bitwise_and_(SIGN))
        kept.bitwise_or_(magnitude.sub_(1).bitwise_right_shift_(31))
    return code.bitwise_and_(kept).to(torch.uint16)


def unpack(bits: Tensor, fmt: Format) -> Tensor:
    """fp32 values of uint16 words."""
    code = bits.to(torch.int32)
    magnitude = code & ~SIGN if fmt.signed else code
    word = (magnitude << fmt.dropped).add_(LOWEST_EXPONENT << 23)
    word.bitwise_and_(magnitude.neg().bitwise_right_shift_(31))
    if fmt.signed:
        word.bitwise_or_(code.bitwise_and_(SIGN).bitwise_left_shift_(16))
    return word.view(torch.float32)
