"""Which losses make a spike."""

import math
import random

import pytest

from dalle_dist.config import WatchConfig
from dalle_dist.watch.spikes import FEWEST, LossSpikes

SETTINGS = WatchConfig(spike=10.0, spike_steps=3)


def noisy(count, level=5.0, seed=0):
    draw = random.Random(seed)
    return [level + draw.gauss(0, 0.1) for _ in range(count)]


def spikes_of(losses, settings=SETTINGS):
    judge = LossSpikes(settings)
    return [number for number, loss in enumerate(losses) if judge.see(loss)]


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_a_falling_loss_are_none(seed):
    falling = [
        9 * math.exp(-step / 300) + noise for step, noise in enumerate(noisy(2_000, 0, seed))
    ]
    assert spikes_of(falling) == []


def test_a_leap_that_stays_is_one_at_the_last_step_that_it_needs():
    assert spikes_of(noisy(50) + [7.0] * 10) == [52]


def test_losses_that_come_back_are_none():
    assert spikes_of([*noisy(50), 7.0, 7.0, *noisy(50, seed=1), 9.0, *noisy(9)]) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_counts_from_the_first_step_on_whatever_the_limit(bad):
    never = WatchConfig(spike=0.0, spike_steps=3)
    assert spikes_of([bad, bad, bad], never) == [2]
    assert spikes_of(noisy(50) + [1e9] * 9, never) == []


def test_the_first_losses_are_not_judged():
    assert spikes_of([1.0] * (FEWEST - 1) + [100.0] + [1.0] * 9) == []
    assert spikes_of([1.0] * FEWEST + [100.0] * 3) == [FEWEST + 2]


def test_losses_that_do_not_vary_need_a_leap_of_some_size():
    assert spikes_of([1.0] * 50 + [1.04] * 9) == []
    assert spikes_of([1.0] * 50 + [1.06] * 9) == [52]


def test_a_spike_that_is_accepted_is_what_is_usual_from_then_on():
    judge = LossSpikes(SETTINGS)
    losses = noisy(50) + [7.0] * 3
    assert [judge.see(loss) for loss in losses][-1]
    assert judge.suspected
    judge.accept()
    assert not judge.suspected and judge.usual == 7.0
    assert not any(judge.see(loss) for loss in [7.1, 6.9] * 30)


def test_a_spike_that_is_undone_leaves_what_was_usual():
    judge = LossSpikes(SETTINGS)
    for loss in noisy(50) + [7.0] * 3:
        judge.see(loss)
    judge.forget()
    assert not judge.suspected and judge.usual == pytest.approx(5.0, abs=0.1)
    assert [judge.see(7.0) for _ in range(3)] == [False, False, True]
