"""Every file of ds_configs/ trains, and to the losses of a run without one."""

import json
from pathlib import Path

import pytest
import tiny_run

from dalle_dist.config import load
from dalle_dist.testing import run_distributed
from dalle_dist.train.run import read_log
from dalle_dist.train.transformer import train

FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
TRAINED = [file for file in FILES if file.stem != "zero3_offload_nvme"]  # that by test_nvme.py
SHORT = {"steps": 3, "eval_every": 3, "save_every": 3, "prompts": []}


def _train(ranks, config):
    train(config)


def losses(config):
    run_distributed(_train, 2, config, timeout=240)
    return [line["loss"] for line in read_log(config.paths.run) if "loss" in line]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The losses of two ranks with nothing of DeepSpeed's said."""
    return losses(tiny_run.make(tmp_path_factory.mktemp("plain"), zero_stage=1, **SHORT))


def configured(folder, file, *overrides):
    stage = json.loads(file.read_text())["zero_optimization"]["stage"]
    path = tiny_run.write_config(tiny_run.make(folder, **SHORT), folder / "config.yaml")
    return load(path, [f"train.deepspeed={file}", f"train.zero_stage={stage}", *overrides])


@pytest.mark.slow
@pytest.mark.parametrize("file", TRAINED, ids=lambda file: file.stem)
def test_each_file_trains(tmp_path, file, plain):
    assert losses(configured(tmp_path, file)) == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_zero_3_inside_a_node_and_powersgd_between_nodes(tmp_path, plain):
    file = next(file for file in FILES if file.stem == "zero3")
    nodes = ["parallel.between_nodes=powersgd", "parallel.local_world_size=1", "parallel.rank=4"]
    found = losses(configured(tmp_path, file, *nodes))
    assert found[0] == pytest.approx(plain[0], rel=1e-5)
    assert found[-1] < found[0] and found != plain


def test_each_file_is_in_the_table():
    table = (FILES[0].parent / "README.md").read_text()
    for file in FILES:
        assert f"| `{file.name}` |" in table
