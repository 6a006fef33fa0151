"""The plan that a run says at its start, and sets beside what it takes, once."""

import pytest

from dalle_dist.config import load
from dalle_dist.plan.hardware import hardware, of_device
from dalle_dist.plan.items import Layout
from dalle_dist.plan.plan import plan
from dalle_dist.train.planned import AFTER, Planned


def test_a_run_says_its_plan_and_once_what_became_of_it():
    made = plan(load("emoji"), Layout(1, 1), hardware("h100-80"))
    planned = Planned(made)
    assert " GB per GPU, " in str(planned) and " s per step, " in str(planned)
    measured = {"seconds_per_step": 2 * made.timing.seconds}
    assert planned.beside(AFTER - 1, measured) == []
    title, row = planned.beside(1, measured)
    assert title.split() == ["plan", "measured", "ratio"]
    name, *_, ratio = row.split()
    assert name == "seconds_per_step" and float(ratio) == pytest.approx(2)
    assert planned.beside(AFTER, measured) == []


def test_where_nobody_has_counted_there_is_nothing_to_say():
    assert str(Planned(None)) == ""
    assert Planned(None).beside(AFTER, {"seconds_per_step": 1.0}) == []


def test_a_gpu_is_known_by_the_name_that_torch_gives():
    assert of_device("NVIDIA H100 80GB HBM3").name == "h100-80"
    assert of_device("NVIDIA A100-SXM4-40GB").name == "a100-40"
    assert of_device("Unknown 9000") is None
