"""Which rank is named as slow, and by what."""

import time

import hung_run
import pytest
import tiny_run
import torch

from dalle_dist.testing import run_distributed
from dalle_dist.train.run import read_log
from dalle_dist.watch.own_time import OwnTime
from dalle_dist.watch.slow_ranks import AGAIN, LINES, SlowRanks

HOSTS = ["n1", "n1", "n2", "n2"]


def lines_of(slow, times, count, step_seconds=0.5):
    return [line for _ in range(count) if (line := slow.line(slow.add(times), step_seconds))]


def test_a_slow_rank_is_named_once_in_a_while():
    slow = SlowRanks(HOSTS, 1.5)
    times = [0.2, 0.22, 0.41, 0.22]
    assert lines_of(slow, times, LINES - 1) == []
    (line,) = lines_of(slow, times, AGAIN)
    assert line == (
        "rank 2 (host n2) takes 1.9 times the median rank's time for samples and forward passes "
        "(0.41 s against 0.22 s a step)"
    )
    assert len(lines_of(slow, times, AGAIN // 2)) == 1
    other = [0.2, 0.22, 0.22, 0.9]
    assert [line[:6] for line in lines_of(slow, other, LINES)] == ["rank 3"]


@pytest.mark.parametrize(
    ("times", "step_seconds"),
    [
        ([0.20, 0.20, 0.29, 0.2], 0.5),  # 1.45 times
        ([0.01, 0.01, 0.02, 0.01], 0.5),  # a hundredth of a second of half a one
        ([0.003, 0.003, 0.015, 0.003], 0.02),  # much of a short step, but little time
    ],
)
def test_what_does_not_hold_up_others_is_not_named(times, step_seconds):
    assert lines_of(SlowRanks(HOSTS, 1.5), times, 3 * LINES, step_seconds) == []


def test_a_single_slow_line_is_not_named():
    slow = SlowRanks(HOSTS, 1.5)
    usual = [0.2] * 4
    told = lines_of(slow, usual, LINES) + lines_of(slow, [0.2, 0.2, 2.0, 0.2], 2)
    assert told + lines_of(slow, usual, LINES) == []


def test_own_time_is_that_of_samples_and_forward_passes_by_step():
    own = OwnTime(torch.device("cpu"), alone=True)
    for _ in range(2):
        with own:
            time.sleep(0.05)
        own.add_step(waited=1.0)
    assert 1.05 <= own.take() < 1.5
    own.add_step(waited=2.0)
    assert own.take() == 2.0


def test_own_time_among_others_leaves_waits_out():
    own = OwnTime(torch.device("cpu"), alone=False)
    with own:
        time.sleep(0.3)
    own.add_step(waited=1.0)
    assert 1.0 <= own.take() < 1.2


def _each(ranks):
    return ranks.each(ranks.rank + 0.5)


def test_each_rank_has_the_numbers_of_all():
    assert run_distributed(_each, 3) == [[0.5, 1.5, 2.5]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_rank_that_is_slow_is_named_by_the_run(tmp_path, zero_stage):
    config = tiny_run.make(
        tmp_path, batch_size=6, prompts=[], zero_stage=zero_stage, sample_every=0, steps=8
    )
    path = tiny_run.write_config(config, tmp_path / "config.yaml")
    (tmp_path / "faulty.py").write_text(hung_run.PROGRAM)
    said, codes = hung_run.start(
        [str(tmp_path / "faulty.py"), "train", path], 3, FAULT="slow", FAULTY="1"
    )
    assert codes == {}
    (line,) = [line for line in said.splitlines() if "the median rank's time" in line]
    assert "rank 1 (host " in line
    numbers = [line for line in read_log(config.paths.run) if "loss" in line]
    assert len(numbers) == 8
    assert {line["slowest_rank"] for line in numbers[2:]} == {1.0}
    assert numbers[-1]["slowest_ratio"] > 1.5
