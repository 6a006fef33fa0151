"""Token shards made by several processes, cut off and gone on with; several crops of an image."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_dist.checkpoint.release import save_dvae_release
from dalle_dist.config import Config
from dalle_dist.data.crops import Crops
from dalle_dist.data.shard_job import share
from dalle_dist.data.shards import ShardSet, ShardWriter
from dalle_dist.dvae.model import DVAE
from dalle_dist.errors import DataError
from dalle_dist.image_tokenizer.registry import load_configured
from dalle_dist.train.encode import encode
from tests import tiny_run

ROOT = Path(__file__).parents[2]
IMAGES, PER_SHARD = 44, 4


@pytest.fixture
def config(tmp_path) -> Config:
    """Of a set of eleven shards to train on, and an untrained dVAE."""
    config = tiny_run.make(tmp_path / "run")
    noise = np.random.default_rng(0)
    for part in ("train", "held-out"):
        folder = f"{config.paths.images}/{part}"
        with ShardWriter(folder, "images", {}, samples_per_shard=PER_SHARD) as writer:
            for i in range(IMAGES if part == "train" else 2):
                pixels = noise.integers(0, 256, (12, 20, 3), np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, format="PNG")
                data = b"no image" if i == 5 else buffer.getvalue()
                writer.write(f"{i:03d}", {"png": data, "txt": f"number {i}".encode()})
    torch.manual_seed(1)
    save_dvae_release(f"{config.paths.dvae_run}/release", config, DVAE(config.dvae).state_dict())
    return elsewhere(config, "codes")


def elsewhere(config, name):
    return tiny_run.with_paths(config, tokens=str(Path(config.paths.tokens).parent / name))


def files(config):
    root = Path(config.paths.tokens)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_shares_of_the_shards_make_what_one_call_makes(config, capsys):
    whole, shared = elsewhere(config, "whole"), elsewhere(config, "shared")
    encode(whole)
    said = capsys.readouterr().out
    assert "whole/train: 43 images, 1 corrupt images skipped; " in said
    for i in (2, 0, 1):
        encode(shared, (i, 3))
        said = capsys.readouterr().out
        assert ("shared/train: 43 images" in said) == (i == 1), "the last one writes the index"
    assert files(shared) == files(whole)
    assert not any("unfinished" in name for name in files(whole))
    with Image.open(f"{whole.paths.tokens}/train-preview.png") as preview:
        assert preview.width > 300
    encode(whole)
    assert "nothing to do" in capsys.readouterr().out


def test_the_ranks_of_a_launcher_share_out_a_share(config, monkeypatch):
    whole, shared = elsewhere(config, "whole"), elsewhere(config, "shared")
    encode(whole)
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        for name, value in (("WORLD_SIZE", 3), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", 3)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "1")
        encode(shared)
    assert files(shared) == files(whole)


def test_crops_are_the_centre_and_others_that_the_seed_draws(config):
    encode(config, crops=3, flip=True)
    tokens = ShardSet(f"{config.paths.tokens}/train", "tokens")
    tokenizer = load_configured(config, torch.device("cpu"))
    assert (tokens.index.meta["crops"], tokens.index.meta["flip"]) == (3, True)
    sample = tokens.read(7)
    codes_KN = np.load(io.BytesIO(sample["npy"]))
    assert codes_KN.shape == (3, 16) and codes_KN.dtype == np.uint16
    about = json.loads(sample["json"])
    assert about["image_tokenizer"] == tokenizer.fingerprint
    assert about["crops"][0] == "centre" and about["crops"][1].startswith("random 1")
    key = sample["__key__"].decode()
    images = ShardSet(f"{config.paths.images}/train", "images")
    with Image.open(io.BytesIO(images.read(int(key))["png"])) as image:
        cut = Crops(8, 3, True, config.seed).cut(image.convert("RGB"), key)
    for crop, codes_N in zip(cut, codes_KN, strict=True):
        pixels_BCHW = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None].float() / 255
        assert tokenizer.encode(pixels_BCHW)[0].tolist() == codes_N.tolist()
    assert len({tuple(codes) for codes in codes_KN.tolist()}) == 3
    held_out = ShardSet(f"{config.paths.tokens}/held-out", "tokens")
    assert np.load(io.BytesIO(held_out.read(0)["npy"])).shape == (16,)
    with pytest.raises(DataError, match="holds tokens of another crops"):
        encode(config, crops=2)


def test_half_of_the_random_crops_are_mirrored():
    crops = Crops(8, 9, True, 0)
    names = [crops.name(str(i), crop) for i in range(100) for crop in range(1, 9)]
    assert 330 < sum(name.endswith("flipped") for name in names) < 470
    assert not any("flipped" in Crops(8, 9, False, 0).name("0", crop) for crop in range(9))


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4"])
def test_a_share_that_makes_no_sense_is_one_line(text):
    with pytest.raises(DataError, match=r"write I/N, e\.g\. 1/4"):
        share(text)
    assert share("4/4") == (3, 4) and share(None) == (0, 1)


@pytest.mark.slow
def test_killed_at_any_time_it_ends_with_the_same_bytes(config):
    """Two processes; each is killed after a random time, several times."""
    whole, killed = elsewhere(config, "whole"), elsewhere(config, "killed")
    encode(whole)
    path = tiny_run.write_config(killed, Path(config.paths.run).parent / "killed.yaml")
    dice, kills = random.Random(0), 0
    index = Path(killed.paths.tokens, "held-out", "index.json")  # written last
    while (found := finished(killed)) < IMAGES // PER_SHARD - 2 and not index.exists():
        started = [start(path, f"{i}/2") for i in (1, 2)]
        while finished(killed) == found and any(process.poll() is None for process in started):
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.005))
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            said = process.communicate()[1]
            assert process.returncode in (0, -signal.SIGKILL), said  # 0: its share was finished
        kills += 1
    assert kills >= 2
    for process in [start(path, "1/2"), start(path, "2/2")]:
        said = process.communicate()[1]
        assert process.returncode == 0, said
    assert files(killed) == files(whole)


def finished(config):
    return len(list(Path(config.paths.tokens, "train", "unfinished").glob("0*.json")))


def start(path, part):
    return subprocess.Popen(
        [sys.executable, "-m", "dalle_dist", "encode", path, "--shard", part],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
