"""The two small matrices of PowerSGD: a seeded Gaussian, and an orthonormal basis.

Shapes: B batch, M rows (the shard's short side), N columns, R rank.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# A panel of this many rows stays in a core's cache while LAPACK goes over it column by column.
PANEL_ROWS = 512
JITTER = 1e-6


def gaussian_RN(seed: int, key: str, rank: int, columns: int) -> Tensor:
    """Q transposed: standard normal, a function of the arguments alone; fp32 on the CPU.

    Drawn on the CPU, whose generator gives the same numbers on every machine.
    """
    text = f"{seed}|{key}|{columns}x{rank}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(rank, columns, generator=generator)


def orthonormal_BMR(p_BMR: Tensor, panel_rows: int = PANEL_ROWS) -> Tensor:
    """An orthonormal basis of each p + 1e-6 I, by Householder QR in fp32 (paper E.2, step 5).

    The shift gives a column of zeros a direction. On CPUs tall matrices are factored in panels of
    rows, and the panels' triangles once more; products of orthonormal factors are orthonormal, so
    this is as stable as one QR of the whole and reads each column from cache. On a GPU the whole is
    quicker (an H100: 0.7 ms instead of 2.2 for 1984 x 112). `p` is overwritten.
    """
    p_BMR.diagonal(dim1=-2, dim2=-1).add_(JITTER)
    batch, rows, rank = p_BMR.shape
    panels = 1 if p_BMR.is_cuda else _panels(rows, rank, panel_rows)
    if panels == 1:
        return torch.linalg.qr(p_BMR)[0]
    height = -(-rows // panels)
    # Rows of zeros fill the last panel up; no reflector touches them, so they stay zeros.
    padded = torch.nn.functional.pad(p_BMR, (0, 0, 0, panels * height - rows))
    bases, triangles = torch.linalg.qr(padded.view(batch, panels, height, rank))
    top = torch.linalg.qr(triangles.reshape(batch, panels * rank, rank))[0]
    basis = bases @ top.view(batch, panels, rank, rank)
    return basis.view(batch, panels * height, rank)[:, :rows]


def _panels(rows: int, rank: int, panel_rows: int) -> int:
    """As many panels as give each about `panel_rows` rows, and at least `rank` to the last too."""
    for panels in range(round(rows / panel_rows), 1, -1):
        if rows - (panels - 1) * -(-rows // panels) >= rank:
            return panels
    return 1
