"""What a plan is made of: counted lines, and how the ranks of a run lie on nodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dalle_dist.config import Config
from dalle_dist.errors import ConfigError


@dataclass(frozen=True)
class Item:
    """One line of a plan.

    amount  bytes, seconds or values, as the list that holds it says
    how     how it was counted, for a reader who wants to follow
    """

    name: str
    amount: float
    how: str


def total(items: Iterable[Item]) -> float:
    return sum(item.amount for item in items)


def nonzero(*items: Item) -> tuple[Item, ...]:
    return tuple(item for item in items if item.amount)


@dataclass(frozen=True)
class Layout:
    """Where the ranks of a run are: one for each GPU."""

    nodes: int
    gpus_per_node: int

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Sharing:
    """Who shares what with whom.

    shard_world  ranks that share weights by ZeRO
    replicas     groups of such ranks, each with all weights
    """

    shard_world: int
    replicas: int

    @classmethod
    def of(cls, config: Config, layout: Layout) -> Sharing:
        """Raises ConfigError: parallel.local_world_size does not divide the ranks."""
        if config.parallel.between_nodes == "zero":
            return cls(layout.world, 1)
        local = config.parallel.local_world_size or layout.gpus_per_node
        replicas, rest = divmod(layout.world, local)
        if rest:
            raise ConfigError(
                f"parallel.local_world_size: {local} does not divide {layout.world} ranks"
            )
        return cls(local, replicas)
