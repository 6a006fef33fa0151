"""How DeepSpeed cuts parameters into what each rank holds, by ZeRO stage.

Stages 1 and 2: the parameters of a group, one after the other, filled up to a multiple of twice the
ranks and cut into equal partitions. Stage 3: each parameter is cut by itself into equal parts, the
last ones filled up; the parts of a rank lie one after the other, in sub-groups of bounded size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

Shapes = Mapping[str, tuple[int, ...]]
SUB_GROUP = 1_000_000_000  # elements: DeepSpeed's own `sub_group_size`
_ALIGNMENT = 2  # elements for each rank, so that pieces of 16 bits begin at whole words


@dataclass(frozen=True)
class Run:
    """Consecutive elements of a parameter in a rank's flat partition.

    start  of the first one in the flattened parameter
    at     where it lies in the partition
    """

    name: str
    start: int
    at: int
    numel: int


@dataclass(frozen=True)
class Partition:
    """One rank's elements of a group; beyond `numel` - `padding` they belong to no parameter.

    runs   of each parameter of which the rank has elements
    """

    numel: int
    padding: int
    runs: Sequence[Run]


def numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def flat_partition(shapes: Shapes, rank: int, world: int) -> Partition:
    """Of a group under ZeRO-1 or 2."""
    total = sum(numel(shape) for shape in shapes.values())
    size = -(-total // (_ALIGNMENT * world)) * _ALIGNMENT
    first, runs, begin = rank * size, [], 0
    for name, shape in shapes.items():
        end = begin + numel(shape)
        start, stop = max(begin, first), min(end, first + size)
        if start < stop:
            runs.append(Run(name, start - begin, start - first, stop - start))
        begin = end
    return Partition(size, size - min(max(total - first, 0), size), runs)


def sub_groups(shapes: Shapes, world: int, largest: int) -> list[Shapes]:
    """Those into which ZeRO-3 divides a group: each ends with the parameter that fills it.

    Args:
        largest: elements of a rank; DeepSpeed's `sub_group_size`.
    """
    found: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size >= largest:
            found.append({})
            size = 0
        found[-1][name] = shape
        size += part_numel(shape, world)
    return list(found)


def part_numel(shape: Sequence[int], world: int) -> int:
    """Elements of a parameter that each rank has a place for under ZeRO-3."""
    return -(-numel(shape) // world)


def cut_partition(shapes: Shapes, rank: int, world: int) -> Partition:
    """Of a sub-group under ZeRO-3; places beyond the parameters' ends are between its runs."""
    runs, at = [], 0
    for name, shape in shapes.items():
        part = part_numel(shape, world)
        start = rank * part
        there = min(part, numel(shape) - start)
        if there > 0:
            runs.append(Run(name, start, at, there))
        at += part
    return Partition(at, 0, runs)


def numbered(groups: Sequence[Sequence[object]]) -> list[list[int]]:
    """Numbers of the members of each group, counted over all groups."""
    found, count = [], 0
    for group in groups:
        found.append(list(range(count, count + len(group))))
        count += len(group)
    return found
