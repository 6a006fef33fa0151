"""Where in the image a mask can be non-zero: what kernels need to know before they look at a pair.

Kernels walk the image tokens in scan order (`MaskRule.by_column`), in which every mask is a band
under the diagonal. Its extent is measured on the rule itself, once per mask and process, and so can
be neither too narrow nor wider than it must be.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dalle_kernels.masks import AttentionMask


@dataclass(frozen=True)
class Span:
    """The band of one mask's image part, in scan positions.

    image      image tokens
    grid       scan positions per line: a row of the image, or a column where `by_column`
    by_column  whether the scan goes down the columns
    window     how many scan positions before its own a query looks at most
    same_line   whether a query never looks out of its own line
    full       whether every query sees all keys from its `first_key` to itself
    """

    image: int
    grid: int
    by_column: bool
    window: int
    same_line: bool
    full: bool

    @property
    def slots(self) -> int:
        """Keys of the image that a decoding step can still look at, or that later steps need.

        Decoding goes in raster order: a column's next token comes a line later, so all are kept.
        """
        if self.by_column:
            return self.image
        return self.grid if self.same_line else self.window + 1

    def first_key(self, query: int) -> int:
        """The first scan position that the query at `query`, or any later one, may look at."""
        line = query // self.grid * self.grid if self.same_line else 0
        return max(line, query - self.window)

    def queries_end(self, key: int) -> int:
        """One past the last scan position whose query may look at `key` or an earlier one."""
        end = (key // self.grid + 1) * self.grid if self.same_line else self.image
        return min(end, key + self.window + 1)


@lru_cache(maxsize=256)
def span(mask: AttentionMask) -> Span:
    """The band of the mask's image part; `window` is reached by at least one query.

    Raises:
        ValueError: a rule under which a query misses itself; a rule by column that leaves its
            column, whose keys would not be there yet when an image is generated row by row.
    """
    import torch

    scan, by_column = torch.arange(mask.image, device="cpu"), mask.rule.by_column
    window, pairs, same_line = 0, 0, True
    for line in scan.split(mask.grid):  # all pairs at once would take gigabytes of a large image
        query, key = mask.visible(line[:, None], scan[None, :]).nonzero().unbind(1)
        back = query + line[0] - key
        if int((back == 0).sum()) < mask.grid:
            raise ValueError(f"kind: {mask.kind!r} hides a query's own key from it")
        window, pairs = max(window, int(back.max())), pairs + len(key)
        same_line = same_line and bool((key >= line[0]).all())
    if by_column and not same_line:
        raise ValueError(f"kind: {mask.kind!r} goes by column and looks out of its own column")
    band = Span(mask.image, mask.grid, by_column, window, same_line, full=False)
    full = pairs == sum(p + 1 - band.first_key(p) for p in range(mask.image))
    return Span(mask.image, mask.grid, by_column, window, same_line, full)
