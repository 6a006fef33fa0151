"""What all ranks say to one another before the first step: few calls, whatever the model's size."""

import warnings
from collections import Counter

import pytest
import tiny_run
import torch.distributed as dist

from dalle_dist.config import from_dict, to_dict
from dalle_dist.testing import run_distributed
from dalle_dist.train import transformer as program
from dalle_dist.train.optimizer_step import OptimizerSteps

KINDS = ("all_reduce", "all_gather_object", "broadcast_object_list", "gather_object", "broadcast",
         "barrier", "new_group")  # fmt: skip


class _FirstStep(Exception):
    """It begins."""


def calls(ranks, config):
    """Those over all ranks, by kind, until the first step begins."""
    warnings.simplefilter("ignore")
    found = Counter()

    def counted(kind, function):
        def call(*arguments, **named):
            group = named.get("group")
            if kind == "new_group" or group is None or group.size() == ranks.world:
                found[kind] += 1
            return function(*arguments, **named)

        return call

    for kind in KINDS:
        setattr(dist, kind, counted(kind, getattr(dist, kind)))
    OptimizerSteps.make = _begin
    with pytest.raises(_FirstStep):
        program.train(config)
    return dict(found)


def _begin(*_):
    raise _FirstStep


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 8])
def test_a_start_takes_few_calls_of_all_ranks_and_no_more_for_more_layers(tmp_path, layers):
    parallel = {"between_nodes": "powersgd", "local_world_size": 2, "rank": 4, "rank_of": "shard"}
    config = tiny_run.make(tmp_path, parallel, zero_stage=3, precision="fp16", prompts=[])
    shape = {**vars(config.transformer), "layers": layers}
    config = from_dict({**to_dict(config), "transformer": shape})
    found = run_distributed(calls, 4, config)[0]
    assert sum(found.values()) <= 120, found
    assert found["new_group"] <= 4, found
