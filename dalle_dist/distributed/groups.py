"""Process groups: shard groups inside a node, replica groups across nodes.

ZeRO splits weights over a shard group; PowerSGD averages gradients over a replica group. With two
nodes of four ranks the shard groups are {0 1 2 3} {4 5 6 7} and the replica groups {0 4} {1 5}
{2 6} {3 7}.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import ConfigError


@dataclass(frozen=True)
class Groups:
    """This rank's process groups, and its ranks in them."""

    shard: dist.ProcessGroup  # the ranks of this node
    replica: dist.ProcessGroup  # the ranks of equal `shard_rank` on every node
    alone: dist.ProcessGroup  # this rank
    node: int  # rank within `replica`
    shard_rank: int  # rank within `shard`
    nodes: int
    local_world_size: int


def node_groups(ranks: Ranks, local_world_size: int | None = None) -> Groups:
    """Make all kinds of groups; every rank of the world calls this.

    Ranks of one host name form a node, in any order of ranks. `local_world_size` overrides that:
    each run of as many consecutive ranks is then a node.

    Raises ConfigError on all ranks: nodes of unequal size, or a `local_world_size` that does not
    divide the world.
    """
    nodes = members(ranks.gather(socket.gethostname()), local_world_size)
    node = next(i for i, row in enumerate(nodes) if ranks.rank in row)
    shard_rank = nodes[node].index(ranks.rank)
    shard, replica, alone = (_by_nccl if ranks.device.type == "cuda" else _by_gloo)(nodes, ranks)
    return Groups(shard, replica, alone, node, shard_rank, len(nodes), len(nodes[0]))


def _by_nccl(nodes: list[list[int]], ranks: Ranks) -> tuple[dist.ProcessGroup, ...]:
    """A mesh splits the world's communicator once for each of its dimensions, not for each group.

    Of 128 nodes of 8 that is 3 calls of all ranks instead of 1,160.
    """
    names = ("node", "shard", "alone")
    mesh = DeviceMesh("cuda", torch.tensor(nodes)[..., None], mesh_dim_names=names)
    return mesh.get_group("shard"), mesh.get_group("node"), mesh.get_group("alone")


def _by_gloo(nodes: list[list[int]], ranks: Ranks) -> tuple[dist.ProcessGroup, ...]:
    """Only members meet: each rank makes the three groups that it is in."""
    row = next(row for row in nodes if ranks.rank in row)
    column = [other[row.index(ranks.rank)] for other in nodes]
    return tuple(
        dist.new_group(group, use_local_synchronization=True)
        for group in (row, column, [ranks.rank])
    )


def members(hosts: Sequence[str], local_world_size: int | None = None) -> list[list[int]]:
    """The ranks of each node, ascending; nodes in the order of their lowest rank.

    Args:
        hosts: host name of every rank.

    Raises ConfigError as `node_groups` does.
    """
    world = len(hosts)
    if local_world_size is not None:
        if local_world_size < 1 or world % local_world_size:
            raise ConfigError(
                f"parallel.local_world_size: {local_world_size} does not divide {world} ranks"
            )
        return [list(range(at, at + local_world_size)) for at in range(0, world, local_world_size)]
    nodes: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        nodes.setdefault(host, []).append(rank)
    if len({len(found) for found in nodes.values()}) > 1:
        sizes = ", ".join(f"{host} has {len(found)}" for host, found in nodes.items())
        raise ConfigError(
            f"parallel.local_world_size: nodes differ in their number of ranks ({sizes}); start as "
            "many on each, or set it to a number that divides them all"
        )
    return list(nodes.values())
