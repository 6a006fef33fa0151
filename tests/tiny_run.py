"""Everything that a stage 2 run needs, in a second: tokens one can learn, a tokenizer, a dVAE."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import torch
import yaml

from dalle_dist.checkpoint.release import save_dvae_release, save_release
from dalle_dist.config import Config, from_dict, to_yaml
from dalle_dist.data.shards import ShardWriter
from dalle_dist.dvae.model import DVAE
from dalle_dist.text_tokenizer.bpe import train_tokenizer
from dalle_dist.transformer.model import Transformer

COLOURS = ("red", "green", "blue", "black", "white", "pink", "brown", "grey")
THINGS = ("heart", "car", "house", "tree", "flag", "cat", "boat", "star")
CAPTIONS = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]

CONFIG = """
name: tiny
data: {workers: 0}
tokenizer: {vocab_size: 300}
dvae: {image_size: 8, codebook_size: 16, width: 8, decoder_stem: 8, downsamplings: 1,
       blocks_per_group: 1}
transformer: {layers: 2, width: 64, heads: 1, text_tokens: 8, image_grid: 4, conv_kernel: 3,
              codebook_size: 16}
train: {batch_size: 8, micro_batch: 2, steps: 6, lr: 5e-3, warmup: 2, ema_every: 2, log_every: 1,
        eval_every: 6, sample_every: 6, save_every: 3, precision: fp32, plateau_window: 2,
        plateau_gain: 0.5, checkpoint_activations: false, prompts: [red heart],
        samples_per_prompt: 2}
"""


def make(folder: Path, parallel: dict[str, object] | None = None, **train: object) -> Config:
    """Write the inputs below `folder` (once), and return the config of a run that uses them.

    `train` replaces values of its train section, `parallel` is another section; the run's folder is
    `folder`/run.
    """
    tree = yaml.safe_load(CONFIG)
    tree["train"] |= train
    tree["parallel"] = parallel or {}
    names = ("images", "tokens", "tokenizer", "dvae_run", "run")
    tree["paths"] = {name: str(folder / name) for name in names}
    config = from_dict(tree)
    if not (folder / "tokenizer").exists():
        train_tokenizer(CAPTIONS, config.tokenizer.vocab_size).save(config.paths.tokenizer)
        torch.manual_seed(1)
        weights = DVAE(config.dvae).state_dict()
        dvae = save_dvae_release(str(folder / "dvae_run" / "release"), config, weights)
        for part, captions in (("train", CAPTIONS[3:]), ("held-out", CAPTIONS[:3])):
            write_tokens(config, f"{config.paths.tokens}/{part}", captions, dvae)
    return config


def with_paths(config: Config, **paths: str) -> Config:
    """The config with other paths."""
    return dataclasses.replace(config, paths=dataclasses.replace(config.paths, **paths))


def write_config(config: Config, path: Path) -> str:
    """The config as a YAML file, for the command line."""
    path.write_text(to_yaml(config))
    return str(path)


def write_tokens(config: Config, folder: str, captions: list[str], dvae: str) -> None:
    """Codes that the caption decides: channel the upper half, thing the lower one."""
    meta = {
        "image_tokenizer": dvae,
        "grid": config.dvae.grid,
        "codebook_size": config.dvae.codebook_size,
    }
    half = config.transformer.image_tokens // 2
    with ShardWriter(folder, "tokens", meta, samples_per_shard=20) as writer:
        for caption in captions:
            colour, thing = caption.split()
            codes = [COLOURS.index(colour)] * half + [8 + THINGS.index(thing)] * half
            buffer = io.BytesIO()
            np.save(buffer, np.array(codes, np.uint16), allow_pickle=False)
            key = caption.replace(" ", "-")
            source = json.dumps({"source": key}).encode()
            writer.write(key, {"npy": buffer.getvalue(), "txt": caption.encode(), "json": source})


def save_random_release(target: Path | str, config: Config) -> None:
    """A release of that config with random weights, beside the tokenizer and dVAE of `make`."""
    torch.manual_seed(3)
    shapes = Transformer(config).state_dict()
    weights = {name: 0.3 * torch.randn(value.shape) for name, value in shapes.items()}
    dvae = f"{config.paths.dvae_run}/release"
    save_release(str(target), config, weights, config.paths.tokenizer, dvae)
