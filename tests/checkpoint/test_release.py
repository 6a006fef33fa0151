"""What is said when a folder is not the release that was asked for."""

import pytest
import tiny_run
import torch

from dalle_dist import Generator
from dalle_dist.checkpoint.release import load_release, save_release
from dalle_dist.errors import CheckpointError
from dalle_dist.image_tokenizer.dvae import DVAETokenizer
from dalle_dist.transformer.model import Transformer


@pytest.fixture
def run(tmp_path):
    """A finished run: its config, its checkpoints, its release."""
    config = tiny_run.make(tmp_path)
    weights = Transformer(config).state_dict()
    folder = tmp_path / "run"
    dvae = str(tmp_path / "dvae_run/release")
    save_release(str(folder / "release"), config, weights, config.paths.tokenizer, dvae)
    (folder / "checkpoints").mkdir()
    tiny_run.write_config(config, folder / "config.yaml")
    return folder


@pytest.mark.parametrize("load", [load_release, DVAETokenizer.load, Generator.load])
def test_a_run_is_not_its_release_which_is_named(run, load):
    with pytest.raises(CheckpointError, match=rf"no release folder \(dvae.*{run}/release\?$"):
        load(f"{run}/")
    assert load(str(run / "release"))


def test_a_run_without_a_release_yet_is_told_so(run):
    (run / "release").rename(run / "elsewhere")
    with pytest.raises(CheckpointError, match=r"has none yet: go on with --resume auto$"):
        load_release(str(run))
    with pytest.raises(CheckpointError, match=r"no release folder \(config.yaml is missing\)$"):
        load_release(str(run / "release"))


def test_a_dvaes_release_is_not_a_whole_models(run, tmp_path):
    folder = tmp_path / "dvae_run" / "release"
    with pytest.raises(CheckpointError, match=f"{folder}: holds an image tokenizer alone"):
        load_release(str(folder))
    assert DVAETokenizer.load(str(folder)).fingerprint


def test_a_path_object_will_do(run):
    generator = Generator.load(run / "release", device="cpu")
    assert next(generator.model.parameters()).device == torch.device("cpu")
    assert load_release(run / "release").fingerprint
