"""What low-rank compression saves, shape by shape, before anything runs.

A shard of m x n is sent as P (m x r) and Q (n x r): (m + n) r values instead of m n. The paper
(table 1) quotes r as the total over a machine's GPUs; each shard gets its part of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from dalle_dist.errors import ConfigError

Shape = tuple[int, ...]


def shard_rank(machine_rank: int, node_size: int) -> int:
    """Rank of one shard when `machine_rank` is the total over the `node_size` ranks of a machine.

    Raises ConfigError when it is not whole.
    """
    rank, rest = divmod(machine_rank, node_size)
    if rest or rank < 1:
        raise ConfigError(
            f"parallel.rank: {machine_rank} is not a multiple of {node_size} ranks per machine"
        )
    return rank


def ratio(shape: Shape, rank: int) -> float:
    """Values sent for a shard of `shape`, per value of the shard."""
    rows, columns = shape
    return (rows + columns) * rank / (rows * columns)


def check_rank(name: str, shape: Shape, rank: int) -> None:
    """Raises ConfigError unless 1 <= rank < min(shape): beyond, P and Q exceed the shard."""
    if not 1 <= rank < min(shape):
        raise ConfigError(
            f"parallel.rank: {rank} per shard does not compress {name} of shape "
            f"{shape[0]}x{shape[1]}; the largest allowed is {min(shape) - 1}"
        )


def compressible(shapes: Mapping[str, Shape], rank: int) -> set[str]:
    """Names of the 2-D shards that P and Q make smaller; the others are to be sent as they are.

    Raises ConfigError as `check_rank` does, for 2-D shards.
    """
    names = set()
    for name, shape in shapes.items():
        if len(shape) == 2:
            check_rank(name, shape, rank)
            if ratio(shape, rank) < 1:
                names.add(name)
    return names


def saved(shapes: Mapping[str, Shape], rank: int) -> float:
    """Part of the values of all 2-D `shapes` that compression leaves out."""
    chosen = compressible(shapes, rank)
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    dense = {name: rows * columns for name, (rows, columns) in matrices.items()}
    sent = sum(
        size * (ratio(matrices[name], rank) if name in chosen else 1)
        for name, size in dense.items()
    )
    return 1 - sent / sum(dense.values())


def table(shapes: Mapping[str, Shape], rank: int) -> str:
    """One line per shape: how many shards have it, and what is sent of each."""
    chosen = compressible(shapes, rank)
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    lines = [f"PowerSGD at rank {rank} per shard leaves out {saved(shapes, rank):.1%}"]
    for shape in sorted(set(matrices)):
        small = any(name in chosen for name, found in shapes.items() if found == shape)
        sent = f"{ratio(shape, rank):.1%} sent" if small else "sent whole: P and Q are no smaller"
        lines.append(f"  {matrices.count(shape):5} x {shape[0]}x{shape[1]}: {sent}")
    return "\n".join(lines)
