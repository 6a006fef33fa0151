"""An imported model is trained on by `dalle-dist train`, resumed, converted and sampled."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from test_mindalle import folder as mindalle  # noqa: F401 - a fixture

from dalle_dist import Generator
from dalle_dist.checkpoint.release import load_release
from dalle_dist.cli import main
from dalle_dist.data.shards import ShardWriter
from dalle_dist.train.run import read_log

CAPTIONS = ("a red heart", "a red car", "the cat reads")


def write_tokens(folder, tokenizer, number):
    meta = {
        "image_tokenizer": tokenizer.fingerprint,
        "grid": tokenizer.grid,
        "codebook_size": tokenizer.codebook_size,
    }
    with ShardWriter(folder, "tokens", meta, samples_per_shard=20) as writer:
        for index in range(number):
            codes, buffer = np.full(tokenizer.grid**2, index % 3, np.uint16), io.BytesIO()
            np.save(buffer, codes, allow_pickle=False)
            caption = CAPTIONS[index % 3].encode()
            writer.write(f"{index:03d}", {"npy": buffer.getvalue(), "txt": caption, "json": b"{}"})


@pytest.mark.parametrize("stage", [0, 2])
def test_fine_tuning(mindalle, tmp_path, stage):  # noqa: F811
    release, run = tmp_path / "release", tmp_path / "run"
    assert main(["convert", str(mindalle), str(release)]) == 0
    tokenizer = load_release(release).image_tokenizer
    for part, number in (("train", 24), ("held-out", 4)):
        write_tokens(str(tmp_path / "tokens" / part), tokenizer, number)
    changes = {
        "train.init": release,
        "image_tokenizer.path": release,
        "paths.tokenizer": release / "tokenizer.json",
        "paths.tokens": tmp_path / "tokens",
        "paths.run": run,
        "train.zero_stage": stage,
        "train.precision": "fp32",
        "train.batch_size": 4,
        "train.micro_batch": 4,
        "train.warmup": 0,
        "train.lr": 0.01,
        "train.save_every": 4,
        "train.log_every": 1,
        "train.prompts": "[a red car]",
        "train.samples_per_prompt": 1,
        "data.workers": 0,
    }
    settings = [f"{key}={value}" for key, value in changes.items()]
    start = ["train", str(release / "config.yaml"), *settings]
    assert main([*start, "train.steps=6"]) == 0
    assert main([*start, "train.steps=12", "--resume", "auto"]) == 0
    losses = [line["loss"] for line in read_log(run) if "loss" in line]
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0]
    before, after = (
        load_release(path).transformer.state_dict() for path in (release, run / "release")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert len(Generator.load(run / "release", device="cpu").generate("a red car", n=2)) == 2
    assert main(["convert", str(run), str(tmp_path / "back"), "--to", "mindalle"]) == 0
    assert Path(tmp_path / "back/stage2_last.ckpt").is_file()
