"""Where in the image a mask can be non-zero: what kernels need to know before they look at a pair.

Kernels walk the image states in an order in which every mask is a band under the diagonal: raster
order, or column by column for column masks. Positions are places in that order, from 0 on. The
bounds are closed forms, so that a compiled kernel can hold them as constants; the tests hold them
against `AttentionMask.dense()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dalle_kernels.masks import AttentionMask


@dataclass(frozen=True)
class Span:
    """The band of one mask's image part.

    image      positions
    grid       positions per line: a row of the picture, or a column where `by_column`
    by_column  position p is the state at row p % grid, column p // grid; else p is the state
    back       how many positions before its own a query looks at most
    own_line   whether a query never looks out of its own line
    """

    image: int
    grid: int
    by_column: bool
    back: int
    own_line: bool

    @property
    def slots(self) -> int:
        """Positions that a decoding step can still look at, its own among them."""
        return self.back + 1

    def position(self, state: int) -> int:
        """Of an image state; its own inverse."""
        return state % self.grid * self.grid + state // self.grid if self.by_column else state

    def first_key(self, query: int) -> int:
        """The first position that the query at `query`, or any later one, may look at."""
        return query // self.grid * self.grid if self.own_line else max(0, query - self.back)

    def queries_end(self, key: int) -> int:
        """One past the last position whose query may look at `key` or an earlier one."""
        if self.own_line:
            return (key // self.grid + 1) * self.grid
        return min(self.image, key + self.back + 1)


@lru_cache(maxsize=256)
def span(mask: AttentionMask) -> Span:
    """The band of the mask's image part; `back` is reached by at least one query."""
    own_line = mask.kind == "column" or (mask.kind == "row" and mask.dialect == "dalle-pytorch")
    back = min(_back(mask, own_line), mask.image - 1)
    return Span(mask.image, mask.grid, mask.kind == "column", back, own_line)


def _back(mask: AttentionMask, own_line: bool) -> int:
    grid, reach = mask.grid, mask.kernel // 2
    if own_line:
        return grid - 1
    if mask.kind == "row":
        return grid
    if mask.kind == "causal":
        return mask.image - 1
    if mask.dialect == "dalle-pytorch":
        return (min(mask.kernel, grid) - 1) * (grid + 1)
    if reach == 0:
        return 0
    if mask.dialect == "torus":
        return mask.image - 1
    if mask.dialect == "clamp":
        return min(reach, grid - 1) * (grid + 1)
    return reach * grid + grid - 1
