"""Error feedback: what compression has left out so far, one buffer per shard (paper E.2).

The buffer doubles as the gradient buffer: `accumulate` adds the new gradient, `subtract_sent` takes
away what has been sent. Kept in fp32, or as 1-6-9 codes at half the memory (the paper's way).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dalle_dist.choices import ErrorDtype
from dalle_dist.gradients.all_reduce import decode, encode


class ErrorBuffer(Protocol):
    """From `accumulate` to `subtract_sent` or `on_overflow`, `values` belongs to the buffer."""

    def accumulate(self, values: Tensor) -> Tensor:
        """Gradient + error; the sum may live in `values` or in the buffer."""

    def subtract_sent(self, values: Tensor, left: Tensor, right: Tensor) -> None:
        """values := left @ right; error := sum - values."""

    def on_overflow(self, values: Tensor) -> None:
        """Nothing was sent: error := sum if that is finite, else 0 (paper E.2, step 12)."""

    def zero(self) -> None:
        """All was sent: error := 0."""

    def read(self) -> Tensor:
        """The error in fp32; not to be written to."""

    def write(self, error: Tensor) -> None:
        """Replace the error."""


def error_buffer(dtype: ErrorDtype, like: Tensor) -> ErrorBuffer:
    """An empty buffer for shards like this one, kept as `dtype`."""
    return _CodedBuffer(like) if dtype == "1-6-9" else _Fp32Buffer(like)


class _Fp32Buffer:
    def __init__(self, like: Tensor) -> None:
        self._error = torch.zeros_like(like, memory_format=torch.contiguous_format)

    def accumulate(self, values: Tensor) -> Tensor:
        return self._error.add_(values)

    def subtract_sent(self, values: Tensor, left: Tensor, right: Tensor) -> None:
        torch.mm(left, right, out=values)
        self._error.sub_(values)

    def on_overflow(self, values: Tensor) -> None:
        if not torch.isfinite(self._error).all():
            self._error.zero_()

    def zero(self) -> None:
        self._error.zero_()

    def read(self) -> Tensor:
        return self._error

    def write(self, error: Tensor) -> None:
        self._error.copy_(error)


class _CodedBuffer:
    def __init__(self, like: Tensor) -> None:
        self._codes = torch.zeros(like.shape, dtype=torch.uint16, device=like.device)

    def accumulate(self, values: Tensor) -> Tensor:
        return values.add_(decode(self._codes))

    def subtract_sent(self, values: Tensor, left: Tensor, right: Tensor) -> None:
        sent = left @ right
        self._codes = encode(values - sent)
        values.copy_(sent)

    def on_overflow(self, values: Tensor) -> None:
        if torch.isfinite(values).all():
            self._codes = encode(values)
        else:
            self._codes.zero_()

    def zero(self) -> None:
        self._codes.zero_()

    def read(self) -> Tensor:
        return decode(self._codes)

    def write(self, error: Tensor) -> None:
        self._codes = encode(error.to(self._codes.device, torch.float32, copy=True))
