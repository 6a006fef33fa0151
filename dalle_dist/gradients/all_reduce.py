"""All-reduce of a mean in a communication dtype: fp32, bf16, fp16, 1-6-9 or int8.

| format | how | bytes that each of N ranks sends for n values |
|---|---|---|
| fp32 | all-reduce | 4 x 2n(N-1)/N |
| bf16, fp16 | all-reduce that adds in this format | 2 x 2n(N-1)/N |
| 1-6-9 | all-to-all of codes, mean in fp32, all-gather of its codes | 2 x 2n(N-1)/N |
| int8 | as 1-6-9; codes of `gradients/int8.py` | 1.004 x 2n(N-1)/N |

No library adds such codes; the two hops of 1-6-9 cost what an all-reduce of 16-bit values costs,
for any N, and round twice, however many ranks there are. A bf16 or fp16 all-reduce rounds at each
addition.

All but fp32 bound what they send: infinities become the largest value, NaN becomes 0. Whether
something was not finite must travel apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.gradients import int8

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Pending(Protocol):
    """A mean that is being communicated."""

    def advance(self) -> None:
        """Launch what follows the first hop. Waiting does so too; earlier, it overlaps."""

    def wait(self) -> Tensor:
        """The mean of `scale * values`, fp32 [n], bit for bit the same on all ranks."""


def bytes_per_value(dtype: str) -> int:
    return {"fp32": 4, "int8": 1}.get(dtype, 2)


@dataclass(frozen=True)
class _Code:
    """Of values that no library adds; `unit` of them are coded together."""

    unit: int
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def launch_mean(
    values: Tensor, group: dist.ProcessGroup, dtype: str = "fp32", scale: float = 1.0
) -> Pending:
    """Start averaging `scale * values` (fp32 [n]) over `group`; `values` is modified in place."""
    if dtype in _CODES:
        return _CodedMean(values.mul_(scale), group, _CODES[dtype])
    return _ReducedMean(values, group, _DTYPES[dtype], scale)


class _ReducedMean:
    def __init__(
        self, values: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, scale: float
    ) -> None:
        # Divided before the sum: N fp16 values of full size have no sum.
        if scale != group.size():
            values.mul_(scale / group.size())
        self._limit = torch.finfo(dtype).max
        self._sent = values
        if dtype != torch.float32:
            self._sent = _bounded(values, self._limit).to(dtype)
        self._work = dist.all_reduce(self._sent, group=group, async_op=True)

    def advance(self) -> None:
        pass

    def wait(self) -> Tensor:
        self._work.wait()
        if self._sent.dtype == torch.float32:
            return self._sent
        return _bounded(self._sent.float(), self._limit)


class _CodedMean:
    """Rank k averages the k-th part of the vector for all."""

    def __init__(self, values: Tensor, group: dist.ProcessGroup, code: _Code) -> None:
        self._group, self._length, self._code = group, len(values), code
        part = -(-self._length // (group.size() * code.unit)) * code.unit
        values = torch.nn.functional.pad(values, (0, part * group.size() - self._length))
        self._sent = code.encode(values)
        self._parts = torch.empty_like(self._sent)
        self._all: Tensor | None = None
        self._work = dist.all_to_all_single(
            _bytes(self._parts), _bytes(self._sent), group=group, async_op=True
        )

    def advance(self) -> None:
        if self._all is not None:
            return
        self._work.wait()
        mean = self._code.decode(self._parts).view(self._group.size(), -1).mean(0)
        self._sent, self._all = self._code.encode(mean), torch.empty_like(self._parts)
        self._work = dist.all_gather_into_tensor(
            _bytes(self._all), _bytes(self._sent), group=self._group, async_op=True
        )

    def wait(self) -> Tensor:
        self.advance()
        self._work.wait()
        assert self._all is not None
        return self._code.decode(self._all)[: self._length]


def encode(values: Tensor) -> Tensor:
    """fp32 to 1-6-9 codes (uint16), infinities to +-15.98, NaN to 0."""
    from dalle_kernels import minifloat

    codes: Tensor = minifloat.pack(_bounded(values, torch.finfo(torch.float32).max), "1-6-9")
    return codes


def decode(codes: Tensor) -> Tensor:
    """1-6-9 codes to fp32."""
    from dalle_kernels import minifloat

    values: Tensor = minifloat.unpack(codes, "1-6-9")
    return values


def _bounded(values: Tensor, limit: float) -> Tensor:
    return values.nan_to_num_(nan=0.0).clamp_(-limit, limit)


def _bytes(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


def _encode_int8(values: Tensor) -> Tensor:
    return int8.encode(_bounded(values, torch.finfo(torch.float32).max))


_CODES = {"1-6-9": _Code(1, encode, decode), "int8": _Code(int8.CHUNK, _encode_int8, int8.decode)}
