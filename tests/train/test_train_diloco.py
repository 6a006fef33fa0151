"""A run whose two nodes train apart: when they meet, what is averaged, and going on from it."""

import dataclasses
import warnings
from pathlib import Path
from unittest import mock

import numpy as np

from dalle_dist.optim.ema import EMA
from dalle_dist.optim.outer import OuterSGD
from dalle_dist.testing import run_distributed
from dalle_dist.train import transformer as program
from dalle_dist.train.run import read_log
from tests import tiny_run

DILOCO = {"between_nodes": "diloco", "local_world_size": 1, "outer_every": 2}
RUN = {"steps": 7, "save_every": 5, "ema_every": 3, "eval_every": 7, "sample_every": 0,
       "zero_stage": 2, "keep": 9}  # fmt: skip


def watched(what, name, events):
    call = getattr(what, name)

    def noted(self, *args, **options):
        events.append(name)
        return call(self, *args, **options)

    return mock.patch.object(what, name, noted)


def trained(ranks, config, resume=None):
    """Calls of outer steps and of the moving average, in their order."""
    warnings.simplefilter("ignore")
    events = []
    with watched(OuterSGD, "step", events), watched(EMA, "update", events):
        program.train(config, resume)
    return events


def test_nodes_meet_when_due_and_before_what_needs_equal_weights(tmp_path):
    """Outer steps after 2 and 4, before the save at 5, and at the end.

    The average, due after 3 and 6, waits for the next of them.
    """
    config = tiny_run.make(tmp_path, DILOCO, **RUN)
    expected = ["step", "step", "update", "step", "step", "update"]
    assert run_distributed(trained, 2, config) == [expected, expected]
    losses = [line["loss"] for line in read_log(Path(config.paths.run)) if "loss" in line]
    assert len(losses) == 7 and losses[-1] < losses[0]

    checkpoint = str(Path(config.paths.run) / "checkpoints" / "step-00000005")
    again = dataclasses.replace(
        config, paths=dataclasses.replace(config.paths, run=str(tmp_path / "again"))
    )
    ends = run_distributed(trained, 2, again, checkpoint)
    assert ends == [["step", "update"]] * 2
    resumed = [line["loss"] for line in read_log(Path(again.paths.run)) if "loss" in line]
    # The same weights; then each node has half of the other's moments.
    assert np.isclose(resumed[0], losses[5], rtol=1e-6) and resumed[1] != losses[6]
    assert np.isclose(resumed[1], losses[6], rtol=1e-2)
