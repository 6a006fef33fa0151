"""Rates of collectives: measured, and the slow host named."""

import threading

import pytest
import wards

from dalle_dist.doctor import network
from dalle_dist.testing import run_distributed


@pytest.mark.parametrize("size", range(2, 9))
def test_every_pair_of_neighbours_has_a_turn_and_no_rank_two_at_once(size):
    ring = [8 * i for i in range(size)]
    groups = network.phases(ring)
    for pairs in groups:
        assert len({rank for pair in pairs for rank in pair}) == 2 * len(pairs)
    found = {frozenset(pair) for pairs in groups for pair in pairs}
    assert found == {frozenset((a, b)) for a, b in zip(ring, [*ring[1:], ring[0]], strict=True)}
    assert len(groups) <= 3


def test_a_slow_node_and_a_slow_link_are_told_apart():
    ring = {(i, (i + 1) % 8): 10.0 for i in range(8)}
    node = {**ring, (2, 3): 1.0, (3, 4): 1.2}
    slow = network.slow_pairs(node)
    assert slow == [(2, 3), (3, 4)] and network.slow_nodes(node, slow) == [3]
    link = {**ring, (5, 6): 1.0}
    assert network.slow_pairs(link) == [(5, 6)] and network.slow_nodes(link, [(5, 6)]) == []
    assert network.slow_pairs(ring) == []


def hosts_of_two(rank):
    wards.socket.gethostname = lambda: "ab"[rank // 2]


def test_rates_are_measured_inside_and_between_hosts():
    results = run_distributed(wards.rows, 4, ["network"], None, hosts_of_two)
    assert all(rows == results[0] for rows in results)
    inside, between, pairs = results[0]
    assert inside[2].startswith("inside nodes, all-reduce: ") and inside[1] in ("ok", "warn")
    assert between[2].startswith("between 2 nodes, all-reduce of each rank: ")
    assert pairs[1] == "ok" and "a (rank 0), b (rank 2)" in pairs[2]
    for row in results[0]:
        assert float(row[2].split(" GB/s")[0].split()[-1]) > 0.001


def slow_rank(rank):
    """To a rank whose clock runs a hundred times as fast, all that it takes part in is slow."""
    wards.own_host(rank)
    right = network.seconds_of
    network.SIZES = (1 << 16, 1 << 16)
    if rank == 2:
        network.seconds_of = lambda patient, send: 1e5 * right(patient, send)


def test_the_slow_host_is_named():
    results = run_distributed(wards.rows, 5, ["network"], None, slow_rank)
    rows = [row for row in results[0] if row[1] == "warn"]
    assert results[4] == results[0]
    assert [row[2].partition(":")[0] for row in rows] == ["n2 (rank 2) with both neighbours"]


def one_hangs(rank):
    wards.own_host(rank)
    network.HANGS = 1.0
    if rank == 1:
        network.all_reduce_rate = lambda patient, group: threading.Event().wait()


def test_a_collective_that_hangs_fails_and_the_ranks_go_on():
    names = ["network", "same code"]
    for rows in run_distributed(wards.rows, 2, names, None, one_hangs):
        assert rows[0][:2] == ("network", "FAIL") and "has not ended after 1 s" in rows[0][2]
        assert rows[-1][:2] == ("same code", "ok")


def one_stays_away(ranks):
    wards.own_host(ranks.rank)
    names = ["ranks", "network", "same code"]
    return None if ranks.rank == 1 else wards.rows(ranks, names, patience=1.0)


def test_without_a_rank_no_collective_is_begun():
    results = run_distributed(one_stays_away, 3)
    ranks, network, code = results[0]
    assert results[2] == results[0]
    assert ranks[:3] == ("ranks", "FAIL", "unknown host (rank 1): has not answered in 1 s")
    assert network[1:3] == ("skip", "without unknown host (rank 1) no collective would end")
    assert code[1] == "ok"


def test_hosts_of_unequal_size_fail():
    rows = run_distributed(wards.rows, 3, ["network"], None, hosts_of_two)[0]
    assert rows[0][1] == "FAIL" and "a has 2, b has 1" in rows[0][2]


def test_one_rank_has_no_network():
    assert run_distributed(wards.rows, 1, ["network"])[0] == [("network", "skip", "one rank", "")]
