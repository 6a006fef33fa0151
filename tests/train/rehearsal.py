"""The preset `12b` with all its own options, only narrow and with little data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import tiny_run
import torch

from dalle_dist.checkpoint.release import save_dvae_release
from dalle_dist.config import Config, load
from dalle_dist.dvae.model import DVAE
from dalle_dist.text_tokenizer.bpe import train_tokenizer

# What makes it small: sizes, data, and how often something is due. The options are the preset's.
SMALL = [
    "transformer.width=64", "transformer.heads=1", "transformer.text_tokens=8",
    "transformer.image_grid=8", "transformer.conv_kernel=3", "dvae.image_size=64", "dvae.width=8",
    "dvae.decoder_stem=8", "dvae.blocks_per_group=1", "data.workers=1",
    "train.samples_per_prompt=1", "train.batch_size=4", "train.steps=10", "train.warmup=4",
    "train.ema_every=5",
    "train.log_every=1", "train.eval_every=10", "train.save_every=5", "train.lr=2e-3",
    "train.plateau_window=5", "parallel.rank=16",
]  # fmt: skip


def config_of(folder: Path, run: str, *overrides: str) -> Config:
    """Of a run below `folder`, whose inputs are made once."""
    names = ("images", "tokens", "tokenizer", "dvae_run")
    paths = [f"paths.{name}={folder / name}" for name in names]
    config = load("12b", [*SMALL, *paths, f"paths.run={folder / run}", *overrides])
    if not (folder / "tokenizer").exists():
        train_tokenizer(tiny_run.CAPTIONS, 300).save(config.paths.tokenizer)
        torch.manual_seed(1)
        weights = DVAE(config.dvae).state_dict()
        dvae = save_dvae_release(str(folder / "dvae_run" / "release"), config, weights)
        for part, captions in (
            ("train", tiny_run.CAPTIONS[3:]),
            ("held-out", tiny_run.CAPTIONS[:3]),
        ):
            tiny_run.write_tokens(config, f"{config.paths.tokens}/{part}", captions, dvae)
    return config


def start(
    config: Config, ranks: int, folder: Path, resume: bool = False
) -> subprocess.Popen[bytes]:
    """`dalle-dist train` on that many ranks under torchrun, in a session of its own."""
    written = tiny_run.write_config(config, folder / f"{Path(config.paths.run).name}.yaml")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(ranks), "-m", "dalle_dist", "train", written,
        *(["--resume", "auto"] if resume else []),
    ]  # fmt: skip
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with Path(f"{config.paths.run}.out").open("ab") as out:
        return subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )


def finish(config: Config, ranks: int, folder: Path, resume: bool = False) -> str:
    """Train to the end; what the run has said. Raises AssertionError: it failed."""
    process = start(config, ranks, folder, resume)
    status = process.wait(timeout=900)
    said = Path(f"{config.paths.run}.out").read_text()
    assert status == 0, said[-3000:]
    return said


def kill_after(process: subprocess.Popen[bytes], checkpoint: Path) -> None:
    """SIGKILL to launcher and ranks as soon as a checkpoint is there."""
    deadline = time.monotonic() + 600
    while not (checkpoint / "manifest.json").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, f"no {checkpoint}"
        time.sleep(0.05)
    # torchrun gives each rank a session of its own.
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, ranks)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
