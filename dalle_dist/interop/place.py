"""Where the inputs of an imported layer stand, and what it keeps of other positions.

Shape suffixes: B batch, N positions of the input, S all positions, X any further dimensions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


class Memory:
    """What one layer keeps of each position while images are sampled: tensors_BSX by name."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.kept: dict[str, Tensor] = {}

    def keep(self, name: str, x_BNX: Tensor, at_BN: Tensor | None) -> Tensor:
        """All positions' tensor, with these written into it; None: they are the first N."""
        if name not in self.kept:
            rest = x_BNX.shape[2:]
            self.kept[name] = x_BNX.new_zeros(x_BNX.shape[0], self.positions, *rest)
        kept_BSX = self.kept[name]
        if at_BN is None:
            kept_BSX[:, : x_BNX.shape[1]] = x_BNX
        else:
            kept_BSX[torch.arange(len(at_BN), device=at_BN.device)[:, None], at_BN] = x_BNX
        return kept_BSX

    def repeat(self, times_C: Tensor) -> None:
        """As many copies of each row as `times_C` says."""
        self.kept = {name: x.repeat_interleave(times_C, dim=0) for name, x in self.kept.items()}


@dataclass(frozen=True)
class Place:
    """Where the N inputs of a layer stand.

    mask    bool [positions, positions], query by key
    at_BN   their positions; None: the first N
    memory  None: the inputs are all that there is
    part    of the layer, whose names in the memory begin with it
    """

    mask: Tensor
    at_BN: Tensor | None = None
    memory: Memory | None = None
    part: str = ""

    def of(self, part: str) -> Place:
        """The same for one of several parts of a layer."""
        return dataclasses.replace(self, part=part)

    def everywhere(self, name: str, x_BNX: Tensor) -> Tensor:
        """x_BSX of all positions that may be looked at, those of these inputs among them.

        `name` tells apart what one part of a layer asks for. Without `at_BN` S is N.
        """
        if self.memory is None:
            return x_BNX
        kept_BSX = self.memory.keep(f"{self.part}{name}", x_BNX, self.at_BN)
        return x_BNX if self.at_BN is None else kept_BSX

    def seen(self, inputs: int) -> Tensor:
        """bool, broadcasts to [B, heads, N, S] of as many inputs; S as `everywhere` has it."""
        if self.at_BN is None:
            return self.mask[:inputs, :inputs]
        assert self.memory is not None
        # Positions past the image, which are computed for nobody, see what the last one sees.
        rows = self.mask[self.at_BN.clamp(max=len(self.mask) - 1)]
        spare = self.memory.positions - rows.shape[-1]
        return torch.nn.functional.pad(rows, (0, spare))[:, None]

    def indices(self, inputs: int, device: torch.device) -> Tensor:
        """Positions of the inputs, int64, [N] or [B, N]."""
        return torch.arange(inputs, device=device) if self.at_BN is None else self.at_BN
