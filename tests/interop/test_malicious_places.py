"""A pickle that runs a command, in every place where a user may have put a stranger's file."""

import shutil
from pathlib import Path

import pytest
import tiny_run
from malicious import write_malicious

from dalle_dist.cli import main
from dalle_dist.train.transformer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    config = tiny_run.make(place, steps=1, warmup=0, zero_stage=0, prompts=[])
    train(config)
    return Path(config.paths.run)


FILES = (
    "dalle.pt", "vae.pt", "encoder.pkl", "pytorch_model_v3.bin", "stage2_last.ckpt",
    "model.safetensors",
)  # fmt: skip
OWN = (
    "release/transformer.safetensors",
    "release/dvae.safetensors",
    "release/tokenizer.json",
    "release/config.yaml",
    "checkpoints/step-00000001/weights-rank-00000.safetensors",
    "checkpoints/step-00000001/average-rank-00000.safetensors",
    "checkpoints/step-00000001/manifest.json",
)


def assert_refused(arguments, mark, capsys):
    assert main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dalle-dist: error: ") and error.count("\n") == 1
    assert not mark.exists()


@pytest.mark.parametrize("inspect", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_files_of_strangers(tmp_path, capsys, name, inspect):
    mark, folder = tmp_path / "mark", tmp_path / "theirs"
    folder.mkdir()
    write_malicious(folder / name, mark)
    if name == "encoder.pkl":
        shutil.copy(folder / name, folder / "decoder.pkl")
    for source in (folder, folder / name):
        words = ["--inspect", source] if inspect else [source, tmp_path / "out"]
        assert_refused(["convert", *words], mark, capsys)


@pytest.mark.parametrize("name", OWN)
def test_files_of_ours_that_were_replaced(run, tmp_path, capsys, name):
    mark, copy = tmp_path / "mark", tmp_path / "run"
    shutil.copytree(run, copy)
    write_malicious(copy / name, mark)
    where = copy / name.split("/")[0]
    if name.startswith("release"):
        commands = [
            ["generate", where, "red heart", "-o", tmp_path / "images"],
            ["convert", where, tmp_path / "out", "--dtype", "bf16"],
        ]
        if "transformer" not in name:  # the conversion copies the others as they are
            commands = commands[:1]
    else:
        commands = [["convert", where / "step-00000001", tmp_path / "out"]]
    for words in commands:
        assert_refused(words, mark, capsys)
