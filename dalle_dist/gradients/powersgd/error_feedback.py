"""Error feedback: what compression has left out so far, one buffer per batch (paper E.2).

The buffer doubles as the gradient buffer: `accumulate` adds the new gradient, `subtract_sent` takes
away what has been sent. Kept in fp32, or as 1-6-9 codes at half the memory (the paper's way).

Shapes: B shards of a batch, M rows and N columns of each.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dalle_dist.choices import ErrorDtype
from dalle_dist.gradients.all_reduce import decode, encode
from dalle_dist.gradients.batches import Batch


class ErrorBuffer(Protocol):
    """From `accumulate` to `subtract_sent` or `keep`, the gradient belongs to the buffer."""

    def accumulate(self, batch: Batch, factor_K1: Tensor) -> None:
        """Add the gradients times the factors of their resblocks, fp32; the sum is there or here.

        A factor of 0 drops what is not to be taken, finite or not.
        """

    def sum(self, batch: Batch, rows: slice) -> Tensor:
        """Gradient + error of these shards [b, M, N]; not to be written to."""

    def subtract_sent(self, batch: Batch, rows: slice, left: Tensor, right: Tensor) -> None:
        """gradient := left @ right; error := sum - gradient."""

    def keep(self, batch: Batch, rows: slice) -> None:
        """Nothing was taken: error := sum if that is finite, else 0 (paper E.2, step 12)."""

    def zero(self, rows: slice) -> None:
        """All was sent: error := 0."""

    def read(self, row: int) -> Tensor:
        """The error of one shard in fp32; not to be written to."""

    def write(self, row: int, error: Tensor) -> None:
        """Replace the error of one shard."""


def error_buffer(dtype: ErrorDtype, shape: tuple[int, ...], device: torch.device) -> ErrorBuffer:
    """An empty buffer for shards of a shape [B, M, N], kept as `dtype`."""
    kind = _CodedBuffer if dtype == "1-6-9" else _Fp32Buffer
    return kind(shape, device)


class _Fp32Buffer:
    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._error_BMN = torch.zeros(shape, device=device)

    def accumulate(self, batch: Batch, factor_K1: Tensor) -> None:
        for rows in batch.chunks:
            factor_B11 = batch.spread(factor_K1[batch.kind.slot_B[rows]])
            values_BMN, dropped_B11 = batch.read(rows), factor_B11 == 0
            # To ask the CPU costs less than to pass over the values; a GPU is not waited for.
            if dropped_B11.is_cuda or dropped_B11.any():
                values_BMN.masked_fill_(dropped_B11, 0)
            self._error_BMN[rows].addcmul_(values_BMN, factor_B11)

    def sum(self, batch: Batch, rows: slice) -> Tensor:
        return self._error_BMN[rows]

    def subtract_sent(self, batch: Batch, rows: slice, left: Tensor, right: Tensor) -> None:
        self._error_BMN[rows].sub_(batch.write_product(rows, left, right))

    def keep(self, batch: Batch, rows: slice) -> None:
        _zero_what_is_not_finite(self._error_BMN[rows])

    def zero(self, rows: slice) -> None:
        self._error_BMN[rows].zero_()

    def read(self, row: int) -> Tensor:
        return self._error_BMN[row]

    def write(self, row: int, error: Tensor) -> None:
        self._error_BMN[row].copy_(error)


class _CodedBuffer:
    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._codes_BMN = torch.zeros(shape, dtype=torch.uint16, device=device)

    def accumulate(self, batch: Batch, factor_K1: Tensor) -> None:
        from dalle_kernels.minifloat import add_decoded

        for rows in batch.chunks:
            total = batch.read(rows)
            add_decoded(total, self._codes_BMN[rows], factor_K1[batch.kind.slot_B[rows]])
            batch.write(rows, total)

    def sum(self, batch: Batch, rows: slice) -> Tensor:
        return batch.read(rows)

    def subtract_sent(self, batch: Batch, rows: slice, left: Tensor, right: Tensor) -> None:
        from dalle_kernels.minifloat import encode_rest

        total = batch.read(rows)
        encode_rest(total, torch.bmm(left, right), self._codes_BMN[rows])
        batch.write(rows, total)

    def keep(self, batch: Batch, rows: slice) -> None:
        total = batch.read(rows).clone()
        _zero_what_is_not_finite(total)
        self._codes_BMN[rows] = encode(total)

    def zero(self, rows: slice) -> None:
        self._codes_BMN[rows] = 0

    def read(self, row: int) -> Tensor:
        return decode(self._codes_BMN[row])

    def write(self, row: int, error: Tensor) -> None:
        codes = encode(error.to(self._codes_BMN.device, torch.float32, copy=True))
        self._codes_BMN[row] = codes


def _zero_what_is_not_finite(sum_BMN: Tensor) -> None:
    """Shard by shard, without asking the device."""
    finite_B = torch.isfinite(sum_BMN).flatten(1).all(1)
    sum_BMN.masked_fill_(~finite_B[:, None, None], 0)
