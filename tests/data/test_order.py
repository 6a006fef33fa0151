import itertools
import pickle

import pytest

from dalle_dist.data.order import SampleOrder

SIZES = [5, 1, 7, 3]


@pytest.mark.parametrize("shuffle_shards", [1, 2, 16])
def test_every_epoch_visits_each_sample_once(shuffle_shards):
    order = SampleOrder(0, SIZES, shuffle_shards)
    for epoch in range(3):
        seen = [order.at(epoch * 16 + place) for place in range(16)]
        assert {e for e, _ in seen} == {epoch}
        assert sorted(i for _, i in seen) == list(range(16))


def test_the_order_depends_on_seed_and_epoch_and_nothing_else():
    def indices(seed, start):
        order = SampleOrder(seed, SIZES, 2)
        return [order.at(p)[1] for p in range(start, start + 16)]

    assert indices(0, 0) == indices(0, 0)
    assert len({tuple(indices(s, start)) for s in (0, 1, -1) for start in (0, 16)}) == 6


def test_samples_mix_only_within_a_group_of_shards():
    order = SampleOrder(3, SIZES, 1)
    shard_of = [shard for shard, size in enumerate(SIZES) for _ in range(size)]
    visited = [shard_of[order.at(p)[1]] for p in range(16)]
    changes = sum(a != b for a, b in itertools.pairwise(visited))
    assert changes == len(SIZES) - 1


def test_an_order_travels_to_another_process():
    order = SampleOrder(0, SIZES, 2)
    first = [order.at(p) for p in range(32)]
    assert [pickle.loads(pickle.dumps(order)).at(p) for p in range(32)] == first
