"""The report of a finished run: one self-contained HTML page, its table as a PNG, its figures."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_dist.checkpoint.release import load_release
from dalle_dist.config import Config
from dalle_dist.data import storage
from dalle_dist.data.loader import ImageDataset, TokenDataset
from dalle_dist.dvae.metrics import codes_used, psnr
from dalle_dist.evaluate.losses import caption_losses
from dalle_dist.evaluate.pictures import Row, curves, data_uri, grid, table
from dalle_dist.generate.generator import Generator
from dalle_dist.train.run import read_log

CAPTIONS, SAMPLES = 24, 4
DVAE_PANELS = ({"nll": "reconstruction, nats/dim"}, {"kl": "KL, nats/dim"}, {"psnr": "PSNR, dB"})
TRAIN_PANELS = (
    {"loss_image": "image, training", "held_out_image": "image, held out"},
    {"loss_text": "text, training", "held_out_text": "text, held out"},
    {"lr": "learning rate"},
)


@dataclass(frozen=True)
class HeldOut:
    keys: list[str]
    captions: list[str]
    images_BCHW: Tensor  # floats in [0, 1]
    text_BT: Tensor
    codes_BN: Tensor


def write_report(config: Config) -> None:
    """Write report.html, report.png and figures.json into the run's folder and print the figures.

    Raises:
        CheckpointError: the run has no release yet.
    """
    release = load_release(storage.join(config.paths.run, "release"))
    generator = Generator(
        release.transformer, release.tokenizer, release.dvae, release.config, release.fingerprint
    )
    held_out = _held_out(config, release.tokenizer, release.dvae_fingerprint)
    figures = measure(config, generator, held_out)
    rows = _draw(generator, held_out, config.seed)
    _write(config, generator, held_out, figures, rows)
    for name, value in figures.items():
        print(f"{name:32} {value}")
    print(f"{storage.join(config.paths.run, 'report.html')}")


def measure(config: Config, generator: Generator, held_out: HeldOut) -> dict[str, Any]:
    """Held-out figures: PSNR of hard codes, share of codes in use, what the captions are worth."""
    reconstructed_BCHW = _reconstruct(generator, held_out.codes_BN)
    losses = caption_losses(generator.model, held_out.text_BT, held_out.codes_BN, seed=config.seed)
    return {
        "held_out_pictures": len(held_out.keys),
        "psnr_db": round(float(psnr(reconstructed_BCHW, held_out.images_BCHW)), 2),
        "codes_used_share": round(_codes_used_anywhere(config), 3),
        "image_loss_right_caption": round(losses.right, 4),
        "image_loss_shuffled_caption": round(losses.shuffled, 4),
        "caption_gain_nats_per_token": round(losses.gain, 4),
        "model": generator.fingerprint,
    }


def _held_out(config: Config, tokenizer: Any, dvae_fingerprint: str) -> HeldOut:
    images = ImageDataset(
        storage.join(config.paths.images, "held-out"), None, config.dvae.image_size, None, 0
    )
    tokens = _tokens(config, "held-out", tokenizer, dvae_fingerprint)
    samples = [images[i] for i in range(len(tokens))]
    text_and_codes = [tokens[i] for i in range(len(tokens))]
    return HeldOut(
        [sample.key for sample in samples],
        [sample.caption for sample in samples],
        torch.stack([sample.image_CHW for sample in samples]).float() / 255,
        torch.stack([text for text, _ in text_and_codes]),
        torch.stack([codes for _, codes in text_and_codes]),
    )


def _tokens(config: Config, part: str, tokenizer: Any, dvae_fingerprint: str) -> TokenDataset:
    return TokenDataset(
        storage.join(config.paths.tokens, part),
        None,
        tokenizer,
        config.transformer.text_tokens,
        0.0,
        config.seed,
        dvae_fingerprint,
        config.transformer.image_grid,
    )


def _codes_used_anywhere(config: Config) -> float:
    from dalle_dist.data.shards import ShardSet

    used: set[int] = set()
    for part in ("train", "held-out"):
        shards = ShardSet(storage.join(config.paths.tokens, part), "tokens")
        for i in range(len(shards)):
            used.update(codes_used(shards.read(i)["npy"]))
    return len(used) / config.dvae.codebook_size
