"""What low-rank compression saves, shape by shape, before anything runs.

A shard of m x n is sent as P (m x r) and Q (n x r): (m + n) r values instead of m n. The paper
(table 1) quotes r as the total over a machine's GPUs; each shard gets its part of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from dalle_dist.errors import ConfigError

Shape = tuple[int, ...]


def shard_rank(machine_rank: int, local_world_size: int) -> int:
    """Rank of one shard when `machine_rank` is the total over the ranks of a node.

    Raises ConfigError when it is not whole.
    """
    rank, rest = divmod(machine_rank, local_world_size)
    if rest or rank < 1:
        raise ConfigError(
            f"parallel.rank: {machine_rank} is not a multiple of {local_world_size} ranks per node"
        )
    return rank


def ratio(shape: Shape, rank: int) -> float:
    """Values sent for a shard of `shape`, per value of the shard."""
    rows, columns = shape
    return (rows + columns) * rank / (rows * columns)


def pays(shape: Shape, rank: int) -> bool:
    """Whether a 2-D shard can be compressed at `rank`, and P and Q are smaller than it."""
    return 0 < rank < min(shape) and ratio(shape, rank) < 1


def check_rank(name: str, shape: Shape, rank: int) -> None:
    """Raises ConfigError unless 1 <= rank < min(shape): beyond, P and Q exceed the shard."""
    if not 1 <= rank < min(shape):
        raise ConfigError(
            f"parallel.rank: {rank} per shard does not compress {name} of shape "
            f"{shape[0]}x{shape[1]}; the largest allowed is {min(shape) - 1}"
        )


def check_ranks(shapes: Mapping[str, Shape], rank: int) -> None:
    """Raises ConfigError as `check_rank` does, and when no shard becomes smaller."""
    for name, shape in shapes.items():
        check_rank(name, shape, rank)
    if not any(pays(shape, rank) for shape in shapes.values()):
        raise ConfigError(
            f"parallel.rank: {rank} per shard makes P and Q no smaller than any shard; lower it"
        )


def saved(shapes: Mapping[str, Shape], rank: int) -> float:
    """Part of the values of all these 2-D shards that compression leaves out."""
    sizes = [rows * columns for rows, columns in shapes.values()]
    sent = [
        size * (ratio(shape, rank) if pays(shape, rank) else 1)
        for size, shape in zip(sizes, shapes.values(), strict=True)
    ]
    return 1 - sum(sent) / sum(sizes) if sizes else 0.0


def table(shapes: Mapping[str, Shape], rank: int) -> str:
    """One line per shape: how many of these 2-D shards have it, and what is sent of each."""
    lines = [f"PowerSGD at rank {rank} per shard leaves out {saved(shapes, rank):.1%}"]
    every = list(shapes.values())
    for shape in sorted(set(every)):
        whole = "sent whole: P and Q are no smaller"
        sent = f"{ratio(shape, rank):.1%} sent" if pays(shape, rank) else whole
        lines.append(f"  {every.count(shape):5} x {shape[0]}x{shape[1]}: {sent}")
    return "\n".join(lines)
