"""Which key each query may look at: the definition that every kernel is tested against.

States are `text` text states, then grid x grid image states in raster order (arXiv 2102.12092, 2.2
and Fig. 11). Text is causal and never sees the image; an image state sees all text, itself, and
the earlier image states that its kind of mask allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["row", "column", "conv", "causal"]
Dialect = Literal["paper", "clamp", "torus", "dalle-pytorch"]


@dataclass(frozen=True)
class AttentionMask:
    """A mask by its kind; `dialect` settles what public models draw differently.

    row     the previous `grid` image states, across line ends; in "dalle-pytorch" the own line
    column  the own column
    conv    a `kernel` x `kernel` window: "paper" wraps as Fig. 11d does, by the flat offsets
            dr * grid + (dc mod grid); "clamp" cuts it at the edges; "torus" wraps both axes;
            "dalle-pytorch" hangs it up and to the left
    causal  all earlier states

    Raises:
        ValueError: naming the argument that does not fit.
    """

    kind: Kind
    text: int
    grid: int
    dialect: Dialect = "paper"
    kernel: int = 11

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: {self.kind!r} is not one of {get_args(Kind)}")
        if self.dialect not in get_args(Dialect):
            raise ValueError(f"dialect: {self.dialect!r} is not one of {get_args(Dialect)}")
        for name in ("text", "grid", "kernel"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not an integer")
        if self.text < 1 or self.grid < 1:
            raise ValueError(f"text, grid: {self.text}, {self.grid} are not both positive")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel: {self.kernel} is not odd and positive")

    @property
    def image(self) -> int:
        """Image states."""
        return self.grid**2

    @property
    def tokens(self) -> int:
        """All states."""
        return self.text + self.image

    def dense(self) -> Tensor:
        """bool [tokens, tokens] (query, key) on the CPU, True where the query may look."""
        shape = (self.tokens, self.tokens)
        allowed = torch.ones(shape, dtype=torch.bool, device="cpu").tril()
        allowed[self.text :, self.text :] &= self.image_part()
        return allowed

    def image_part(self) -> Tensor:
        """bool [image, image] (query, key): the mask among image states."""
        state = torch.arange(self.image, device="cpu")
        query, key = state[:, None], state[None, :]
        rule: dict[Kind, Callable[[Tensor, Tensor], Tensor]] = {
            "row": self._row,
            "column": lambda q, k: (q - k) % self.grid == 0,
            "conv": self._conv,
            "causal": lambda q, k: q >= k,
        }
        return rule[self.kind](query, key) & (query >= key)

    def _row(self, query: Tensor, key: Tensor) -> Tensor:
        if self.dialect == "dalle-pytorch":
            return query // self.grid == key // self.grid
        return query - key <= self.grid

    def _conv(self, query: Tensor, key: Tensor) -> Tensor:
        reach = self.kernel // 2
        if self.dialect == "paper":
            rows, columns = range(reach + 1), range(-reach, reach + 1)
            offsets = {dr * self.grid + dc % self.grid for dr in rows for dc in columns}
            return torch.isin(query - key, torch.tensor(sorted(offsets), device="cpu"))
        dr, dc = query // self.grid - key // self.grid, query % self.grid - key % self.grid
        if self.dialect == "dalle-pytorch":
            return (dr < self.kernel) & (dc >= 0) & (dc < self.kernel)
        if self.dialect == "torus":
            dr, dc = (torch.minimum(d % self.grid, -d % self.grid) for d in (dr, dc))
        return (dr.abs() <= reach) & (dc.abs() <= reach)
