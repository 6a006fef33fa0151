"""The order of samples: a function of (seed, position), of which a rank has its own part."""

import itertools
import pickle
from collections import Counter

import pytest

from dalle_dist.data.order import KeyedPermutation, SampleOrder
from dalle_dist.errors import ConfigError

SIZES = [5, 1, 7, 0, 3]  # 16 samples


@pytest.mark.parametrize("streams", [1, 4, 6, 16, 32])
@pytest.mark.parametrize("shuffle_shards", [1, 2, 16])
def test_every_epoch_visits_each_sample_once(streams, shuffle_shards):
    order = SampleOrder(0, SIZES, streams, shuffle_shards)
    every = {(shard, number) for shard, size in enumerate(SIZES) for number in range(size)}
    for epoch in range(4):
        seen = [order.at(epoch * 16 + place) for place in range(16)]
        assert {place.epoch for place in seen} == {epoch}
        assert len(seen) == len(every) and {place[1:] for place in seen} == every


def test_the_order_depends_on_seed_and_epoch_and_not_on_what_was_asked_before():
    def places(seed, start):
        order = SampleOrder(seed, SIZES, 4, 2)
        return [order.at(p)[1:] for p in range(start, start + 16)]

    assert places(0, 0) == places(0, 0)
    assert len({tuple(places(s, start)) for s in (0, 1, -1) for start in (0, 16)}) == 6
    order = SampleOrder(0, SIZES, 4, 2)
    backwards = [order.at(p) for p in reversed(range(64))]
    assert [order.at(p) for p in range(64)] == backwards[::-1]


def test_a_streams_samples_mix_only_within_a_window_of_shards():
    order = SampleOrder(3, [10] * 12, 2, 2)
    for stream in (0, 1):
        visited = [order.at(p).shard for p in range(stream, 120, 2)]
        windows = [set(visited[i : i + 20]) for i in range(0, 60, 20)]
        assert [len(window) for window in windows] == [2, 2, 2]
        changes = sum(a != b for a, b in itertools.pairwise(visited))
        assert changes > 12, "the two shards of a window alternate"


@pytest.mark.parametrize("world", [1, 2, 4, 8, 3, 24])
def test_ranks_share_out_the_shards_and_keep_their_share(world):
    """Of 200 shards only those at the ends of shares have two owners, in every epoch the same."""
    order = SampleOrder(1, [10] * 200, 24, 2)
    owned = [
        {order.at(p).shard for p in range(2000 * epoch + rank, 2000 * (epoch + 1), world)}
        for epoch in (0, 1)
        for rank in range(world)
    ]
    assert sum(map(len, owned[:world])) <= 200 + world * (24 // world if world == 3 else 1)
    if 2000 % world == 0:
        for before, after in zip(owned[:world], owned[world:], strict=True):
            assert len(before ^ after) <= 2


def test_ranks_that_cannot_share_the_streams_are_refused():
    order = SampleOrder(0, SIZES, 8, 1)
    order.require(4)
    with pytest.raises(ConfigError, match=r"data.streams: 8 streams cannot be shared by 3 ranks"):
        order.require(3)


def test_what_stands_in_for_a_shard_is_another_one_with_samples():
    order = SampleOrder(0, SIZES, 4, 1)
    for shard in range(5):
        stand_in = order.after(shard, {shard})
        assert stand_in not in (shard, 3)
        assert order.after(shard, {shard, stand_in}) not in (shard, stand_in, 3)
    assert order.after(0, {0, 1, 2, 4}) == 0, "there is none"


def test_an_order_travels_to_another_process():
    order = SampleOrder(0, SIZES, 4, 2)
    first = [order.at(p) for p in range(32)]
    assert [pickle.loads(pickle.dumps(order)).at(p) for p in range(32)] == first


@pytest.mark.parametrize("size", [1, 2, 64, 65, 97, 1000, 4097])
def test_a_keyed_permutation_is_one(size):
    permutation = KeyedPermutation(size, "key")
    assert sorted(map(permutation.at, range(size))) == list(range(size))
    with pytest.raises(IndexError):
        permutation.at(size)


@pytest.mark.parametrize("size", [5, 100])
def test_keyed_permutations_send_a_number_anywhere_alike(size):
    """5,000 keys; chi-square with size - 1 degrees of freedom, six standard deviations allowed."""
    counts = Counter(KeyedPermutation(size, str(key)).at(1) for key in range(5000))
    expected = 5000 / size
    chi_square = sum((counts[i] - expected) ** 2 / expected for i in range(size))
    assert chi_square < size - 1 + 6 * (2 * (size - 1)) ** 0.5


def test_neighbours_do_not_stay_neighbours():
    permutation = KeyedPermutation(10_000, "key")
    steps = Counter(permutation.at(i + 1) - permutation.at(i) for i in range(9_999))
    assert steps.most_common(1)[0][1] < 15
