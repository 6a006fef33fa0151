"""What a report says of the run itself: data, both stages, models, sampling, versions, warnings."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import PurePosixPath
from typing import Any

import torch

from dalle_dist.config import Config
from dalle_dist.generate.generator import Generator
from dalle_dist.report.inputs import TrainingImages
from dalle_dist.report.samples import CHOICE, SAMPLES
from dalle_dist.train import banner
from dalle_dist.train.held_out_images import START_AGAIN

FEW_CODES = 0.05  # share of the codebook in use below which images can hardly differ
PACKAGES = ("dalle-dist", "torch", "deepspeed")
Log = list[dict[str, Any]]


def title(config: Config) -> str:
    """By the folders of the data set and of the run: many runs share the name of a preset."""
    data, run = (PurePosixPath(p).name or p for p in (config.paths.images, config.paths.run))
    return f"dalle-dist: data set {data}, run {run} (config {config.name})"


def table_facts(shown: int, held_out: int, train: TrainingImages) -> dict[str, str]:
    """By what rule the captions of the table were chosen, and its training images found."""
    total = f"{train.total:,} training images"
    compared = (
        f"all {total}" if len(train) == train.total else f"the first {len(train):,} of {total}"
    )
    return {
        "captions shown": f"{shown} of {held_out:,} held-out ones, {CHOICE}",
        "samples of each": f"the first {SAMPLES}, none left out",
        "nearest in training": "the training image nearest to the first sample, by the sum of "
        f"squares over pixels and channels, among {compared}",
        "words trained on": f"those of the captions of {compared}",
    }


def run_facts(
    config: Config, generator: Generator, held_out: int, train: int, logs: dict[str, Log]
) -> dict[str, str]:
    """What was trained, on what, for how long, and by which options its images are sampled.

    Args:
        held_out: how many images; `train` likewise.
        logs: lines of log.jsonl of the stages that have one, by stage.
    """
    return {
        "data set": banner.images(config.paths.images, train, held_out),
        **{stage: length(log) for stage, log in logs.items()},
        "image tokenizer": _image_tokenizer(generator),
        "transformer": _transformer(generator),
        "sampling": ", ".join(
            f"{name.replace('_', ' ')} {value}"
            for name, value in asdict(generator.config.sampling).items()
        ),
        "seed": str(config.seed),
        "versions": _versions(),
    }


def warnings(share_in_use: float, dvae_log: Log) -> list[str]:
    """What must be known before the images are judged.

    Args:
        share_in_use: of the codebook, over all images.
        dvae_log: lines of stage 1; empty where it has no log here.
    """
    found = []
    if share_in_use < FEW_CODES:
        found.append(
            f"Only {share_in_use:.1%} of the image tokenizer's codes are in use: what it cannot "
            "reconstruct, no transformer can generate. Look at the reconstructions below."
        )
    states = [line["codes_collapsed"] for line in dvae_log if "codes_collapsed" in line]
    if states and states[-1] == 1:
        found.append(
            "The codes had collapsed at stage 1's last evaluation: fewer than half as many in use, "
            f"or half as varied, as at its best one; {START_AGAIN}."
        )
    return found


def length(log: Log) -> str:
    """Steps, epochs and wall time by a log's lines, those of evaluations included."""
    if not log:
        return "its log is empty"
    epochs = [line["epoch"] for line in log if "epoch" in line]
    seen = f", {epochs[-1]:.2f} epochs" if epochs else ""
    # What came before the first line is known by its pace alone.
    before = log[0]["step"] * log[0].get("seconds_per_step", 0.0)
    seconds = round(log[-1]["time"] - log[0]["time"] + before)
    hours, rest = divmod(seconds, 3600)
    clock = f"{hours} h {rest // 60:02} min" if hours else f"{rest // 60} min {rest % 60:02} s"
    return f"{log[-1]['step']:,} steps{seen}, {clock} from start to last line of the log"


def _image_tokenizer(generator: Generator) -> str:
    tokenizer, kind = generator.image_tokenizer, generator.config.image_tokenizer.kind
    model = getattr(tokenizer, "model", None)  # one that was trained elsewhere may have none
    size = f" of {_parameters(model):,} parameters" if isinstance(model, torch.nn.Module) else ""
    side, grid = tokenizer.image_size, tokenizer.grid
    return (
        f"{kind}{size}: {side} x {side} pixels to {grid} x {grid} codes out of "
        f"{tokenizer.codebook_size:,}, {tokenizer.fingerprint}"
    )


def _transformer(generator: Generator) -> str:
    shape = generator.config.transformer
    return (
        f"{_parameters(generator.model):,} parameters: {shape.layers} layers of width "
        f"{shape.width}, {shape.text_tokens} text + {shape.image_tokens:,} image tokens, "
        f"{generator.fingerprint}"
    )


def _parameters(model: torch.nn.Module) -> int:
    return sum(weights.numel() for weights in model.parameters())


def _versions() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return f"{', '.join(found)}; report made on {device}"
