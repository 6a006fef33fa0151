"""Which resblock each parameter belongs to: the one map that scaling, PowerSGD and skips share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Resblocks:
    """The resblocks of a model, numbered in the order of its forward pass.

    count     how many there are
    of        number of the resblock, by the name of each parameter that is in one
    matrices  shape of each two-dimensional parameter that is in one, by name
    stacked   how many matrices are stacked along the first axis of a parameter, where it is more
              than one (queries, keys and values)
    """

    count: int = 0
    of: Mapping[str, int] = field(default_factory=dict)
    matrices: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    stacked: Mapping[str, int] = field(default_factory=dict)
