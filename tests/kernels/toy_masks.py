"""Masks that only the tests know: one entry each, and every backend must follow them."""

from dalle_kernels.masks import MASKS, AttentionMask, MaskRule


def _diagonal(q: int, k: int, grid: int, radius: int) -> bool:
    right = q % grid - k % grid
    return right == q // grid - k // grid


def _pair_above(q: int, k: int, grid: int, radius: int) -> bool:
    return (q // grid == k // grid) & (q - k <= radius)


def _every_other(q: int, k: int, grid: int, radius: int) -> bool:
    return (q // grid == k // grid) & ((q - k) % 2 == 0)


RULES = {
    "toy diagonal": MaskRule(_diagonal),
    "toy pair above": MaskRule(_pair_above, by_column=True),
    "toy every other": MaskRule(_every_other),
}


def registered(monkeypatch, kind, text, grid):
    """The mask of that name, in the table until the test ends."""
    monkeypatch.setitem(MASKS, kind, {"paper": RULES[kind]})
    return AttentionMask(kind, text, grid, kernel=3)


def allowed(kind, grid, query, key):
    """The same by rows and columns, for raster positions: what a slow loop asks."""
    (row, column), (key_row, key_column) = divmod(query, grid), divmod(key, grid)
    if kind == "toy diagonal":
        return key <= query and row - key_row == column - key_column
    if kind == "toy pair above":
        return column == key_column and 0 <= row - key_row <= 1
    return row == key_row and column >= key_column and (column - key_column) % 2 == 0
