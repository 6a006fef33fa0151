"""What a run says of its checkpoints, starts from, keeps, and does when one cannot be read."""

import dataclasses
import re
from pathlib import Path
from unittest import mock

import pytest
import tiny_run
import torch

from dalle_dist.checkpoint import read, store
from dalle_dist.checkpoint.formats import load_tensors, save_tensors
from dalle_dist.checkpoint.manifest import read_manifest
from dalle_dist.errors import CheckpointError, UserError
from dalle_dist.testing import run_distributed
from dalle_dist.train.run import read_log
from dalle_dist.train.transformer import train

FEW = {"zero_stage": 0, "prompts": [], "eval_every": 100}


def losses(config):
    return [line["loss"] for line in read_log(config.paths.run) if "loss" in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of seven steps, whose average takes in each fourth."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_run.make(folder, steps=7, ema_every=4, save_every=2, keep=1, keep_every=4, **FEW)
    train(config)
    return config


def test_the_start_writes_and_reads_a_checkpoint(tmp_path, capsys):
    train(tiny_run.make(tmp_path, steps=1, warmup=0, **FEW))
    said = capsys.readouterr().out
    assert re.search(r"a checkpoint takes 0.00\d+ GB; written in \d.\d\d s, read back in ", said)


def test_a_start_that_could_not_save_trains_no_step(tmp_path):
    config = tiny_run.make(tmp_path, steps=1, warmup=0, **FEW)
    with (
        mock.patch.object(store, "digest", return_value="of other bytes"),
        pytest.raises(CheckpointError, match=r"step-00000000: .* is damaged"),
    ):
        train(config)
    assert losses(config) == []


def test_milestones_stay_beside_the_newest(finished):
    assert store.steps(f"{finished.paths.run}/checkpoints") == [4, 7]


def test_the_average_is_no_older_than_its_run(finished):
    checkpoints = f"{finished.paths.run}/checkpoints"
    updates = [
        read_manifest(store.step_folder(checkpoints, step)).training["ema_updates"]
        for step in (4, 7)
    ]
    assert updates == [1, 2]


def test_a_resumed_run_says_what_it_restored(finished, capsys):
    train(finished, "auto")
    said = capsys.readouterr().out
    assert "restored step 7; average, exp_avg, exp_avg_sq, weights; learning rate sch" in said
    assert "position 56 in the training set" in said and "translated" not in said


def started(finished, folder, **changes):
    """A run of its own from the release of the finished one."""
    train_ = dataclasses.replace(finished.train, init=f"{finished.paths.run}/release", steps=2)
    config = dataclasses.replace(finished, train=dataclasses.replace(train_, **changes))
    return tiny_run.with_paths(config, run=str(folder / "run"))


def test_a_run_starts_from_a_release(finished, tmp_path, capsys):
    config = started(finished, tmp_path, lr=1e-9)
    train(config)
    assert "starts from the weights of " in capsys.readouterr().out
    first = losses(config)[0]
    assert first < losses(finished)[0] - 0.2
    before = load_tensors(f"{finished.paths.run}/release/transformer.safetensors")
    after = load_tensors(tmp_path / "run/release/transformer.safetensors")
    for name, values in before.items():
        torch.testing.assert_close(after[name], values, rtol=0, atol=1e-6)


def test_a_resumed_run_does_not_start_again(finished, tmp_path, capsys):
    train(started(finished, tmp_path))
    capsys.readouterr()
    train(started(finished, tmp_path, steps=3), "auto")
    assert "starts from" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state | {"norm.weight": torch.ones(3)}, "'norm.weight': 64 elements wanted"),
        (lambda state: {k: v for k, v in state.items() if k != "norm.weight"}, "none there"),
    ],
)
def test_weights_that_do_not_fit_are_refused(finished, tmp_path, change, said):
    state = load_tensors(f"{finished.paths.run}/release/transformer.safetensors")
    save_tensors(tmp_path / "other.safetensors", change(state))
    for init, reason in ((tmp_path / "other.safetensors", said), (tmp_path, "no release folder")):
        with pytest.raises(CheckpointError, match=reason):
            train(started(finished, tmp_path, init=str(init)))


def out_of_memory(ranks, config):
    """Rank 1 cannot hold what it is to load."""
    if ranks.rank == 1:
        read.read_elements = mock.Mock(side_effect=MemoryError())
    with pytest.raises(UserError) as caught:
        train(config, "auto")
    return str(caught.value)


def test_a_rank_without_memory_ends_all_in_one_line(tmp_path):
    config = tiny_run.make(tmp_path, steps=2, **FEW | {"zero_stage": 2})
    train(config)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
    for message in run_distributed(out_of_memory, 2, longer, timeout=60):
        assert message.startswith("rank 1: ") and "out of memory while it was read" in message
        assert "\n" not in message
    assert Path(config.paths.run, "checkpoints/step-00000002/manifest.json").is_file()
