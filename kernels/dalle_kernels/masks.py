"""Which key each query may look at: the definition that every kernel is tested against.

A sequence is `text` text tokens, then grid x grid image tokens in raster order (arXiv 2102.12092,
2.2 and Fig. 11). Text is causal and never sees the image; an image token sees all text, itself, and
the earlier image tokens that its mask's rule allows.

A new mask is one entry in `MASKS`. Everything that backends need to know of it is derived from its
rule (`dalle_kernels.spans`); none of them knows a mask by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # whoever only wants the names of masks does not wait for torch
    from torch import Tensor

    Index = TypeVar("Index", int, Tensor)


def _all_earlier(q: int, k: int, grid: int, radius: int) -> bool:
    return k <= q


def _last_grid_tokens(q: int, k: int, grid: int, radius: int) -> bool:
    return q - k <= grid


def _same_line(q: int, k: int, grid: int, radius: int) -> bool:
    return q // grid == k // grid


def _conv_wrapped(q: int, k: int, grid: int, radius: int) -> bool:
    """Fig. 11d: flat offsets down * grid + (right mod grid), |right| up to the radius."""
    right = (q - k) % grid
    return ((q - k) // grid <= radius) & ((right <= radius) | (right >= grid - radius))


def _conv_clamped(q: int, k: int, grid: int, radius: int) -> bool:
    right = q % grid - k % grid
    return (q // grid - k // grid <= radius) & (right <= radius) & (right >= -radius)


def _conv_torus(q: int, k: int, grid: int, radius: int) -> bool:
    down, right = q // grid - k // grid, (q - k) % grid
    near_rows = (down <= radius) | (down >= grid - radius)
    return near_rows & ((right <= radius) | (right >= grid - radius))


def _conv_corner(q: int, k: int, grid: int, radius: int) -> bool:
    down, right = q // grid - k // grid, q % grid - k % grid
    return (down <= 2 * radius) & (right >= 0) & (right <= 2 * radius)


@dataclass(frozen=True)
class MaskRule:
    """One mask among image tokens.

    visible    (q, k, grid, radius) to whether the query at scan position q may look at the key at
               scan position k <= q; what it says of later keys does not count. The same function
               is evaluated on torch tensors and compiled by Triton: a `def` with operators only
               (+ - * // % & | and comparisons), no names from outside it, and in its signature no
               types but int and bool.
    by_column  scan positions go down the columns, so that p is the token at row p % grid, column
               p // grid, and the rule never leaves a column. Otherwise they are raster order.
    """

    visible: Callable[..., Any]
    by_column: bool = False


# By kind and variant. Public models draw the paper's masks differently: a variant is one model's
# set, and a kind that it does not name is that of "paper".
MASKS: dict[str, dict[str, MaskRule]] = {
    # The previous `grid` image tokens, across line ends; or the own line alone.
    "row": {"paper": MaskRule(_last_grid_tokens), "dalle-pytorch": MaskRule(_same_line)},
    # The own column.
    "column": {"paper": MaskRule(_same_line, by_column=True)},
    # A `kernel` x `kernel` window that wraps to the line above, is cut at the edges, wraps both
    # axes, or hangs up and to the left.
    "conv": {
        "paper": MaskRule(_conv_wrapped),
        "clamp": MaskRule(_conv_clamped),
        "torus": MaskRule(_conv_torus),
        "dalle-pytorch": MaskRule(_conv_corner),
    },
    # All earlier tokens.
    "causal": {"paper": MaskRule(_all_earlier)},
}


def variants() -> tuple[str, ...]:
    """Names of all variants in `MASKS`."""
    return tuple(dict.fromkeys(name for rules in MASKS.values() for name in rules))


@dataclass(frozen=True)
class AttentionMask:
    """A mask of `MASKS` by its kind and variant, on one shape; `kernel` is of conv masks, odd.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    kind: str
    text: int
    grid: int
    variant: str = "paper"
    kernel: int = 11

    def __post_init__(self) -> None:
        if self.kind not in MASKS:
            raise ValueError(f"kind: {self.kind!r} is not one of {', '.join(MASKS)}")
        if self.variant not in variants():
            raise ValueError(f"variant: {self.variant!r} is not one of {', '.join(variants())}")
        for name in ("text", "grid", "kernel"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not an integer")
        if self.text < 1 or self.grid < 1:
            raise ValueError(f"text, grid: {self.text}, {self.grid} are not both positive")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel: {self.kernel} is not odd and positive")

    @property
    def rule(self) -> MaskRule:
        rules = MASKS[self.kind]
        return rules.get(self.variant, rules["paper"])

    @property
    def is_causal(self) -> bool:
        """Whether it hides nothing but later tokens, which torch's kernels do by themselves."""
        return self.rule.visible is _all_earlier

    @property
    def radius(self) -> int:
        """How far a conv mask's window reaches from its middle."""
        return self.kernel // 2

    @property
    def image(self) -> int:
        """Image tokens."""
        return self.grid**2

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.text + self.image

    def scan(self, position: Index) -> Index:
        """The scan position of the image token at a raster position; its own inverse."""
        if not self.rule.by_column:
            return position
        return position % self.grid * self.grid + position // self.grid

    def visible(self, q: Index, k: Index) -> Index:
        """Whether the query at scan position q may look at scan position k, later ones included."""
        return self.rule.visible(q, k, self.grid, self.radius) & (k <= q)

    def dense(self) -> Tensor:
        """bool [tokens, tokens] (query, key) on the CPU, True where the query may look."""
        import torch

        shape = (self.tokens, self.tokens)
        allowed = torch.ones(shape, dtype=torch.bool, device="cpu").tril()
        allowed[self.text :, self.text :] &= self.image_part()
        return allowed

    def image_part(self) -> Tensor:
        """bool [image, image] (query, key) in raster order: the mask among image tokens."""
        import torch

        scan = self.scan(torch.arange(self.image, device="cpu"))
        return self.visible(scan[:, None], scan[None, :])
