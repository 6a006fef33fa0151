"""How far a run is in its training set: a checkpoint has it, and nothing is skipped unsaid."""

import dataclasses
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from dalle_dist import storage
from dalle_dist.checkpoint.manifest import read_manifest
from dalle_dist.data.notes import Notes
from dalle_dist.distributed import process_group
from dalle_dist.errors import ConfigError, DataError
from dalle_dist.train import transformer as program
from dalle_dist.train.data import Amiss, Progress, in_flight
from dalle_dist.train.run import read_log
from tests import tiny_run

ORDER = {"training set": "61 samples, aa", "seed": 0, "data.streams": 8}
ALONE = SimpleNamespace(gather=lambda value: [value])


def test_a_run_goes_on_at_the_sample_where_it_was(tmp_path):
    saved = Progress(136, ORDER, 61).state_dict()
    progress = Progress(0, dict(ORDER), 61)
    progress.load_state_dict(saved, False, tmp_path)
    assert (progress.samples, progress.epoch) == (136, 2)


@pytest.mark.parametrize("new_epoch", [False, True])
def test_another_order_is_refused_with_what_differs_or_begins_an_epoch(tmp_path, new_epoch):
    saved = Progress(136, ORDER, 61).state_dict()
    progress = Progress(0, ORDER | {"seed": 1, "training set": "80 samples, bb"}, 80)
    if new_epoch:
        progress.load_state_dict(saved, True, tmp_path)
        assert (progress.samples, progress.epoch) == (240, 3)
        return
    with pytest.raises(ConfigError) as caught:
        progress.load_state_dict(saved, False, tmp_path)
    assert "seed: 0 -> 1; training set: 61 samples, aa -> 80 samples, bb" in str(caught.value)
    assert "--new-epoch" in str(caught.value)


def test_an_epoch_that_is_just_over_is_not_counted_twice(tmp_path):
    progress = Progress(0, {"seed": 1}, 61)
    progress.load_state_dict(Progress(122, {"seed": 0}, 61).state_dict(), True, tmp_path)
    assert progress.epoch == 2


def test_a_checkpoint_of_before_there_was_an_order_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="the samples would come in another order"):
        Progress(0, ORDER, 61).load_state_dict({}, False, tmp_path)


def test_the_end_of_an_epoch_says_what_was_amiss(monkeypatch):
    monkeypatch.setattr(storage, "retries", dict)  # those of other tests of this process
    amiss = Amiss(ALONE, bad_shards=1)
    corrupt = {f"key{i}" for i in range(7)}
    amiss.notes.add(Notes(corrupt, {"00001.tar": "gone"}, captions=200, cut=3, empty=2))
    line, numbers = amiss.summary(1, 61)
    assert line == (
        "epoch 1 of 61 samples ends: 7 samples corrupt (key0, key1, key2, key3, key4, ...); "
        "shards quarantined: 00001.tar; 1.5% of captions cut, 2 empty"
    )
    assert numbers == {
        "samples_corrupt": 7,
        "shards_quarantined": 1,
        "epoch_captions_cut": 0.015,
        "epoch_captions_empty": 0.01,
    }
    line, numbers = amiss.summary(2, 61)
    assert numbers["samples_corrupt"] == 0
    assert numbers["shards_quarantined"] == 1, "it stays so"


def test_more_bad_shards_over_all_ranks_than_may_be_stop_the_run():
    found = [Notes(quarantined={f"0000{rank}.tar": "gone"}) for rank in (1, 2)]
    amiss = Amiss(SimpleNamespace(gather=lambda value: found), bad_shards=1)
    with pytest.raises(DataError, match=r"gone \(2 shards are bad, data.bad_shards allows 1"):
        amiss.summary(1, 61)


def test_a_resumed_run_refuses_another_window_unless_it_begins_an_epoch(tmp_path, capfd):
    config = tiny_run.make(tmp_path, steps=9, warmup=1, zero_stage=0, prompts=[], log_every=3)
    program.train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8)))
    said = capfd.readouterr().out
    # BPE dropout makes a caption or two too long.
    assert re.search(r"epoch 1 of 61 samples ends: 0 samples corrupt; \d.\d% of captions cut", said)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, shuffle_shards=3))
    with pytest.raises(ConfigError, match=r"data.shuffle_shards: 2 -> 3; go on as it was, or"):
        program.train(other, "auto")
    program.train(other, "auto", new_epoch=True)
    folder = Path(config.paths.run)
    saved = read_manifest(str(folder / "checkpoints/step-00000009")).training["data"]
    assert saved["samples"] == 2 * 61 + 8
    lines = read_log(folder)
    assert [line["step"] for line in lines if "samples_corrupt" in line] == [8]
    assert all(0 <= line["data_wait"] <= 1 for line in lines if "loss" in line)


def test_what_a_node_has_in_flight_is_said_and_compared_with_its_cache(bucket, monkeypatch):
    config = remote_config(bucket)
    stage = program.TransformerStage(config, process_group.init())
    monkeypatch.setenv("DALLE_DIST_CACHE_BYTES", str(10**9))
    ranks = SimpleNamespace(gather=lambda value: [value], world=1)
    said = in_flight(stage.train_set, ranks)
    assert said.startswith("4 shards at a time on a node, 0.0 GB, in ")
    assert said.endswith(" (at most 1 GB)")
    monkeypatch.setenv("DALLE_DIST_CACHE_BYTES", "1000")
    assert "TOO LITTLE: shards are fetched again and again" in in_flight(stage.train_set, ranks)
    assert in_flight(stage.held_out, ranks) == "", "it is read in its own order"


def remote_config(bucket):
    """Of a set of four shards in a bucket."""
    folder = Path(os.environ["DALLE_DIST_CACHE"]) / "inputs"
    config = tiny_run.make(folder, zero_stage=0)
    for path in Path(config.paths.tokens).rglob("*"):
        if path.is_file():
            name = path.relative_to(config.paths.tokens)
            storage.write_bytes(f"{bucket}/tokens/{name}", path.read_bytes())
    return tiny_run.with_paths(config, tokens=f"{bucket}/tokens")


def test_the_cache_of_a_run_lies_where_its_config_says(bucket, tmp_path):
    config = remote_config(bucket)
    data = dataclasses.replace(config.data, cache=str(tmp_path / "mine"), cache_gb=0.5)
    run = dataclasses.replace(config.train, steps=1, warmup=0, prompts=())
    program.train(dataclasses.replace(config, data=data, train=run))
    assert list((tmp_path / "mine/objects").rglob("*.tar"))
    assert storage.cache_budget() == 500_000_000
