"""The step that is compared at a run's start: it passes, and tells of a DeepSpeed that differs."""

from dataclasses import replace

import pytest

from dalle_dist.config import TrainConfig
from dalle_dist.engine.deepspeed import known_step
from dalle_dist.engine.deepspeed.engine import DeepSpeedEngine
from dalle_dist.engine.deepspeed.versions import check_version
from dalle_dist.errors import ConfigError
from dalle_dist.testing import run_distributed

CASES = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16", "fp16")]


def outcome(ranks, stage, precision):
    settings = replace(TrainConfig(), zero_stage=stage, precision=precision)
    try:
        known_step.check_known_step(settings, ranks)
    except ConfigError as error:
        return str(error)
    return ""


def all_pass(ranks):
    return {case: outcome(ranks, *case) for case in CASES}


@pytest.mark.slow
def test_the_tested_version_passes_on_any_number_of_ranks():
    for ranks in (1, 2, 4):
        for found in run_distributed(all_pass, ranks):
            assert found == dict.fromkeys(CASES, "")


def halved(ranks):
    """What 0.18.3 did: accumulated gradients are divided once more."""
    backward = DeepSpeedEngine.backward
    DeepSpeedEngine.backward = lambda self, loss: backward(self, loss / self.accumulation)
    return {case: outcome(ranks, *case) for case in CASES}


def last_alone(ranks):
    """What 0.17.6 did: only the last micro-batch counts."""
    backward, seen = DeepSpeedEngine.backward, []

    def only_the_last(self, loss):
        seen.append(loss)
        backward(self, loss * (len(seen) % self.accumulation == 0))

    DeepSpeedEngine.backward = only_the_last
    return {case: outcome(ranks, *case) for case in CASES}


@pytest.mark.parametrize("fault", [halved, last_alone])
def test_a_deepspeed_that_computes_otherwise_is_refused_on_all_ranks(fault):
    first, second = run_distributed(fault, 2)
    assert first == second
    for case, said in first.items():
        assert "computes a step otherwise than it must" in said, case
        assert " instead of " in said and "install 0.19.8" in said, case


def test_a_newer_version_than_tested_needs_a_word(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"0\.20\.0 is newer than what is tested; install 0\.19\.8"
    ):
        check_version("0.20.0", "fp32", 2, "zero")
    monkeypatch.setenv("DALLE_DIST_ANY_DEEPSPEED", "1")
    check_version("0.20.0", "fp32", 2, "zero")
