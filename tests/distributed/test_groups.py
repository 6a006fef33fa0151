import pytest
import torch
import torch.distributed as dist

from dalle_dist.distributed import groups
from dalle_dist.errors import ConfigError
from dalle_dist.testing import run_distributed


def _describe(ranks, local_world_size):
    found = groups.node_groups(ranks, local_world_size)
    members = [dist.get_process_group_ranks(g) for g in (found.shard, found.replica)]
    total = torch.tensor([1 << ranks.rank])
    dist.all_reduce(total, group=found.replica)
    numbers = (found.node, found.shard_rank, found.nodes, found.local_world_size)
    return *members, *numbers, int(total)


@pytest.mark.parametrize(
    ("world", "local_world_size", "expected"),
    [
        (
            4,
            2,
            [
                ([0, 1], [0, 2], 0, 0, 2, 2, 0b0101),
                ([0, 1], [1, 3], 0, 1, 2, 2, 0b1010),
                ([2, 3], [0, 2], 1, 0, 2, 2, 0b0101),
                ([2, 3], [1, 3], 1, 1, 2, 2, 0b1010),
            ],
        ),
        (3, 1, [([r], [0, 1, 2], r, 0, 3, 1, 0b111) for r in range(3)]),
        (4, 1, [([r], [0, 1, 2, 3], r, 0, 4, 1, 0b1111) for r in range(4)]),
        (2, None, [([0, 1], [r], 0, r, 1, 2, 1 << r) for r in range(2)]),
    ],
)
def test_shard_groups_are_machines_and_replica_groups_cross_them(world, local_world_size, expected):
    assert run_distributed(_describe, world, local_world_size) == expected


def test_host_names_make_machines_in_any_order_of_ranks():
    """mpirun may deal ranks out to nodes in turn."""
    assert groups.members(["b", "a", "b", "a"]) == [[0, 2], [1, 3]]
    assert groups.members(["b", "a", "b", "a"], local_world_size=2) == [[0, 1], [2, 3]]


def test_machines_of_unequal_size_are_refused_with_their_sizes():
    with pytest.raises(ConfigError, match=r"parallel\.local_world_size: .*\(a has 2, b has 1\)"):
        groups.members(["a", "b", "a"])


@pytest.mark.parametrize("local_world_size", [3, 0, -1, 8])
def test_a_local_world_size_that_does_not_divide_is_refused(local_world_size):
    with pytest.raises(
        ConfigError, match=f"local_world_size: {local_world_size} does not divide 4 ranks"
    ):
        groups.members(["a"] * 4, local_world_size)


def _fails_everywhere(ranks):
    with pytest.raises(ConfigError, match="does not divide 3"):
        groups.node_groups(ranks, 2)
    return True


def test_the_refusal_reaches_all_ranks():
    assert run_distributed(_fails_everywhere, 3) == [True] * 3
