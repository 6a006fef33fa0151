"""The verb `samples`: a run's sample images from its checkpoints, by a process beside training.

A model that is sharded over many GPUs draws badly there: its weights would be gathered anew for
each of 1,024 tokens, or whole on one GPU while all others wait. A checkpoint has them in one place,
so one GPU of any machine draws from it, and training is not stopped for a second.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, replace

import torch
import yaml

from dalle_dist import storage
from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.convert import weights_of
from dalle_dist.checkpoint.formats import LazyTensors
from dalle_dist.checkpoint.manifest import read_manifest
from dalle_dist.config import Config, from_dict
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.generate.generator import DTYPES
from dalle_dist.generate.grid import sample_grid
from dalle_dist.image_tokenizer.registry import load_configured
from dalle_dist.text_tokenizer.registry import load_text_tokenizer
from dalle_dist.transformer.protocol import TextImageTransformer
from dalle_dist.transformer.registry import build_transformer, with_weights

NAME = "samples"


@dataclass(frozen=True)
class Drawing:
    """How a run's samples are drawn.

    run        folder of the run, local or remote
    prompts    instead of the config's; empty: those
    weights    "ema", the average, or "raw"
    precision  of the layers: fp32, bf16 or fp16
    device     where
    """

    run: str
    prompts: tuple[str, ...]
    weights: str
    precision: str
    device: torch.device


def draw(drawing: Drawing, follow: bool, every: float) -> list[str]:
    """Draw from the run's newest checkpoint; the paths of the images.

    Args:
        follow: go on with each that comes, until the run's last step.
        every: seconds between two looks.

    Raises:
        ConfigError: no prompts.
        CheckpointError: no run there, or no checkpoint, and not to be followed.
    """
    drawn: dict[int, str] = {}
    while True:
        config = _config(drawing)
        found = store.steps(storage.join(drawing.run, "checkpoints"))
        if found and found[-1] not in drawn:
            drawn[found[-1]] = _draw_step(drawing, config, found[-1])
        if not follow or (drawn and max(drawn) >= config.train.steps):
            break
        time.sleep(every)
    if not drawn:
        raise CheckpointError(f"{drawing.run}: no checkpoint yet; --follow waits for the first")
    return list(drawn.values())


def load_model(
    config: Config, state: LazyTensors, precision: str, device: torch.device
) -> TextImageTransformer:
    """A frozen model on `device`, filled tensor by tensor; its layers in 16 bits, if asked for."""
    weights = {}
    for name in state:
        dtype = DTYPES[precision] if name.startswith("blocks.") else torch.float32
        weights[name] = state[name].to(device, dtype)
    return with_weights(lambda: build_transformer(config), weights).requires_grad_(False)


def _draw_step(drawing: Drawing, config: Config, step: int) -> str:
    checkpoint = store.step_folder(storage.join(drawing.run, "checkpoints"), step)
    state = weights_of(checkpoint, read_manifest(checkpoint), drawing.weights)
    model = load_model(config, state, drawing.precision, drawing.device)
    image = sample_grid(
        model,
        load_configured(config, drawing.device),
        load_text_tokenizer(config.tokenizer.kind, config.paths.tokenizer),
        config,
        drawing.device,
    )
    path = storage.join(drawing.run, NAME, f"step-{step:08d}-{NAME}.png")
    png = io.BytesIO()
    image.save(png, "PNG")
    storage.write_bytes(path, png.getvalue())
    print(path, flush=True)
    return path


def _config(drawing: Drawing) -> Config:
    """The config that the run saved."""
    path = storage.join(drawing.run, "config.yaml")
    if not storage.exists(path):
        raise CheckpointError(f"{drawing.run}: no run there (it has no config.yaml)")
    config = from_dict(yaml.safe_load(storage.read_bytes(path)))
    prompts = list(drawing.prompts) or config.train.prompts
    if not prompts:
        raise ConfigError(f"{drawing.run}: train.prompts is empty; give PROMPTs")
    return replace(config, train=replace(config.train, prompts=prompts))
