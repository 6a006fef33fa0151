"""What a job's script is told of its work."""

import dataclasses

import pytest
import tiny_run

from dalle_dist import storage
from dalle_dist.cli import main
from dalle_dist.train.transformer import train


def said(capsys, *words):
    status = main(["progress", *words])
    return status, capsys.readouterr().out.strip()


@pytest.fixture
def config(tmp_path):
    return tiny_run.make(tmp_path, steps=4, save_every=2, eval_every=4, prompts=[])


@pytest.fixture
def path(config, tmp_path):
    return tiny_run.write_config(config, tmp_path / "config.yaml")


def test_from_nothing_to_a_release(config, path, capsys, tmp_path):
    assert said(capsys, "train", path) == (0, "none")
    train(config)
    capsys.readouterr()
    assert said(capsys, "train", path) == (0, "finished")
    # A run that is asked for more steps has not ended with its release.
    assert said(capsys, "train", path, "train.steps=8") == (0, "4")
    release = tmp_path / "run" / "release" / "config.yaml"
    release.rename(release.with_suffix(".gone"))
    assert said(capsys, "train", path) == (0, "4")


def test_a_run_that_was_stopped_stays_so_while_the_file_is_there(config, path, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    assert said(capsys, "train", path) == (0, "stopped")


def test_starts_in_vain_are_counted_until_one_comes_further(config, path, capsys, tmp_path):
    found = [said(capsys, "--in-vain", "train", path)[1] for _ in range(3)]
    assert found == ["1", "2", "3"]
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)), "auto")
    capsys.readouterr()
    assert said(capsys, "--in-vain", "train", path) == (0, "1")


def test_of_other_verbs_files_are_counted(path, capsys, tmp_path):
    out = tmp_path / "images"
    words = ("generate", "release", "a cat", "-o", str(out))
    assert said(capsys, *words) == (0, "0")
    storage.write_bytes(str(out / "1.png"), b"x")
    assert said(capsys, "--in-vain", *words) == (0, "1")
    assert said(capsys, *words) == (0, "1")  # the count itself is none of them


def test_a_verb_that_leaves_nothing_is_refused(capsys):
    assert main(["progress", "slurm"]) == 2
    assert "nothing that goes on later" in capsys.readouterr().err
