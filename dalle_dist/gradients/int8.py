"""fp32 as int8 with one fp32 scale for every CHUNK values: 1.004 bytes a value."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1024
_LARGEST = 127


def encode(values: Tensor) -> Tensor:
    """fp32 [C x CHUNK], finite, to uint8 [C x (CHUNK + 4)].

    The largest value of a chunk keeps its size; each is off by no more than 1/254 of it.
    """
    chunks = values.view(-1, CHUNK)
    scale_C1 = chunks.abs().amax(1, keepdim=True) / _LARGEST
    codes = (chunks / scale_C1.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
    return torch.cat([codes.view(torch.uint8), scale_C1.view(torch.uint8)], 1).view(-1)


def decode(codes: Tensor) -> Tensor:
    """uint8 of `encode` to fp32 [C x CHUNK]."""
    chunks = codes.view(-1, CHUNK + 4)
    scale_C1 = chunks[:, CHUNK:].contiguous().view(torch.float32)
    return (chunks[:, :CHUNK].view(torch.int8) * scale_C1).view(-1)
