"""The rule by which scales change, by table."""

import json
import math

import pytest

from dalle_dist.precision.scales import BlockScales


def logs(scales):
    return [math.log2(value) for value in scales.values]


@pytest.mark.parametrize(("replicas", "start"), [(1, 13), (8, 16), (1024, 23)])
def test_start_is_13_bits_above_the_number_of_replicas(replicas, start):
    assert logs(BlockScales(3, replicas)) == [start] * 3


def test_a_good_update_multiplies_by_the_thousandth_root_of_two():
    scales = BlockScales(2, 1)
    for _ in range(1000):
        scales.update([False, False])
    assert scales.values == [2.0**14] * 2


def test_a_bad_block_alone_is_divided_by_the_root_of_two():
    scales = BlockScales(3, 1)
    scales.update([False, True, False])
    assert logs(scales) == pytest.approx([13.001, 12.5, 13.001], abs=1e-6)
    assert scales.overflows == [0, 1, 0]


def test_no_second_division_within_125_updates():
    """Updates after the first bad one, all bad: divided again by the 126th after it."""
    scales = BlockScales(1, 1)
    divided, before = [], 13.0
    for update in range(400):
        scales.update([True])
        (now,) = logs(scales)
        if now < before:
            divided.append(update)
        before = now
    assert divided == [0, 126, 252, 378]
    assert scales.overflows == [400]


def test_growth_goes_on_between_bad_updates_of_a_window():
    scales = BlockScales(1, 1)
    for bad in (True, False, False, True, False):
        scales.update([bad])
    assert logs(scales) == pytest.approx([12.503], abs=1e-6)


@pytest.mark.parametrize("replicas", [1, 16])
def test_clamps(replicas):
    high, low = BlockScales(1, replicas), BlockScales(1, replicas)
    for _ in range(12_000):
        high.update([False])
    assert high.values == [replicas * 2.0**24]
    for _ in range(126 * 30):
        low.update([True])
    assert low.values == [replicas * 2.0**7]


def test_saved_scales_go_on_bit_for_bit():
    first, second = BlockScales(2, 4), BlockScales(2, 4)
    pattern = [[u % 7 == 0, u % 50 == 3] for u in range(300)]
    for bad in pattern[:77]:
        first.update(bad)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.values == first.values and second.overflows == first.overflows
    for bad in pattern[77:]:
        first.update(bad)
        second.update(bad)
    assert second.state_dict() == first.state_dict()
    assert second.scale_K.equal(first.scale_K)
