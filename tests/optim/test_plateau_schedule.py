import pytest

from dalle_dist.config import TrainConfig
from dalle_dist.optim.plateau_schedule import PlateauSchedule


def _rates(schedule, losses):
    rates = []
    for update, loss in enumerate(losses, start=1):
        rates.append(schedule.rate(update))
        schedule.observe(update, loss)
    return rates


def test_rate_warms_up_linearly_and_halves_at_the_given_updates():
    config = TrainConfig(lr=8.0, warmup=4, halve_at=[6, 7, 9], halvings=2)
    rates = _rates(PlateauSchedule(config), [1.0] * 10)
    assert rates == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 4.0, 2.0, 2.0, 2.0]


def test_rate_halves_when_a_window_gains_too_little_and_not_right_after_a_halving():
    config = TrainConfig(lr=8.0, warmup=2, plateau_window=2, plateau_gain=0.1, halvings=2)
    # after the warm-up: 10, 8 (gain), 7.9 (stalled), 7.9 (only noted), 7.8 (stalled), ..
    losses = [99, 98, 10, 10, 8, 8, 7.9, 7.9, 7.9, 7.9, 7.8, 7.8, 7.8, 7.8, 7.8, 7.8, 7.8]
    rates = _rates(PlateauSchedule(config), losses)
    assert rates[2:8] == [8.0] * 6
    assert rates[8:12] == [4.0] * 4
    assert rates[12:] == [2.0] * 5  # `halvings` is the most there may be


def test_a_saved_schedule_goes_on_as_if_never_stopped():
    config = TrainConfig(lr=1.0, warmup=1, plateau_window=3, plateau_gain=0.05, halvings=9)
    losses = [5.0 - 0.02 * i for i in range(40)]
    whole = _rates(PlateauSchedule(config), losses)
    for stop in (1, 5, 17):
        first, second = PlateauSchedule(config), PlateauSchedule(config)
        head = _rates(first, losses[:stop])
        second.load_state_dict(first.state_dict())
        tail = []
        for update in range(stop + 1, len(losses) + 1):
            tail.append(second.rate(update))
            second.observe(update, losses[update - 1])
        assert head + tail == whole
    assert whole[-1] == pytest.approx(1 / 2**6)


def test_without_warmup_the_first_update_has_the_full_rate():
    assert PlateauSchedule(TrainConfig(lr=3.0, warmup=0)).rate(1) == 3.0
