"""Who shares a machine: shard groups on one machine, replica groups across machines.

ZeRO splits weights over a shard group; PowerSGD averages gradients over a replica group. With two
machines of four ranks the shard groups are {0 1 2 3} {4 5 6 7} and the replica groups {0 4} {1 5}
{2 6} {3 7}.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from dalle_dist.distributed.launch import Ranks
from dalle_dist.errors import ConfigError


@dataclass(frozen=True)
class Groups:
    """This rank's two process groups, and its place in them."""

    shard: dist.ProcessGroup  # the ranks of this machine
    replica: dist.ProcessGroup  # the ranks of equal `local` on every machine
    machine: int  # rank within `replica`
    local: int  # rank within `shard`
    machines: int
    local_world_size: int


def machine_groups(ranks: Ranks, local_world_size: int | None = None) -> Groups:
    """Make both kinds of groups; every rank of the world calls this.

    Ranks of one host name form a machine, in any order of ranks. `local_world_size` overrides
    that: each run of `local_world_size` consecutive ranks is then a machine.

    Raises ConfigError on all ranks: machines of unequal size, or a `local_world_size` that does not
    divide the world.
    """
    machines = members(ranks.gather(socket.gethostname()), local_world_size)
    columns = [list(column) for column in zip(*machines, strict=True)]
    shard, _ = dist.new_subgroups_by_enumeration(machines)
    replica, _ = dist.new_subgroups_by_enumeration(columns)
    machine = next(i for i, row in enumerate(machines) if ranks.rank in row)
    local = machines[machine].index(ranks.rank)
    return Groups(shard, replica, machine, local, len(machines), len(columns))


def members(hosts: Sequence[str], local_world_size: int | None = None) -> list[list[int]]:
    """The ranks of each machine, ascending; machines in the order of their lowest rank.

    Args:
        hosts: host name of every rank.

    Raises ConfigError as `machine_groups` does.
    """
    world = len(hosts)
    if local_world_size is not None:
        if local_world_size < 1 or world % local_world_size:
            raise ConfigError(
                f"parallel.local_world_size: {local_world_size} does not divide {world} ranks"
            )
        return [list(range(at, at + local_world_size)) for at in range(0, world, local_world_size)]
    machines: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        machines.setdefault(host, []).append(rank)
    if len({len(found) for found in machines.values()}) > 1:
        sizes = ", ".join(f"{host} has {len(found)}" for host, found in machines.items())
        raise ConfigError(
            f"parallel.local_world_size: machines differ in their number of ranks ({sizes}); start "
            "as many on each, or set it to a number that divides them all"
        )
    return list(machines.values())
