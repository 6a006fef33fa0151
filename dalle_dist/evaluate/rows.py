"""Work on many images, shared by ranks: rows of numbers, in the order of the images.

What a network makes of an image depends in its last digits on what it is computed beside. So the
chunks are the same for any number of ranks, and figures are made of all rows by one rank.

Shape suffixes: N images, V values of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dalle_dist.distributed.process_group import Ranks

IMAGES, SEQUENCES = 64, 16  # of a chunk: for image networks, for the transformer


def gathered(
    ranks: Ranks, count: int, rows_of: Callable[[range], Tensor], chunk: int = IMAGES
) -> Tensor:
    """rows_NV of all numbers below `count` on rank 0, in their order; none on other ranks.

    A collective call; raises the UserError of `rows_of` of any rank on all.

    Args:
        rows_of: of a chunk of numbers: rows_NV, or one row for all of them.
    """
    starts = range(ranks.rank * chunk, count, ranks.world * chunk)
    own = ranks.together(
        lambda: {start: rows_of(range(start, min(start + chunk, count))).cpu() for start in starts}
    )
    parts = {start: rows for part in ranks.gather_on_main(own) for start, rows in part.items()}
    return torch.cat([parts[start] for start in sorted(parts)]) if parts else torch.empty(0)
