"""The block that opens a run: what is about to be trained, on what, for how long."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import torch

from dalle_dist.config import CLIPTrainConfig, DVAETrainConfig, TrainConfig
from dalle_dist.distributed.process_group import Ranks


def table(block: Mapping[str, str]) -> str:
    """Names in one column, what is said of them in the other; rows without text are left out."""
    return "\n".join(f"  {name:9}  {text}" for name, text in block.items() if text)


def devices(ranks: Ranks) -> str:
    """Kind and number of the devices of all ranks; a collective call."""
    nodes = _counted(len(set(ranks.gather(socket.gethostname()))), "node")
    launcher = "one process" if ranks.launcher == "single" else ranks.launcher
    if ranks.device.type == "cuda":
        name = f"{ranks.world:,} x {torch.cuda.get_device_name(ranks.device)}"
    else:
        threads = _counted(torch.get_num_threads(), "thread")
        name = f"CPU, {_counted(ranks.world, 'rank')} x {threads}"
    return f"{name}, {nodes} ({launcher})"


def images(folder: str, train: int, held_out: int) -> str:
    return f"{folder}: {train:,} images to train on, {held_out:,} held out"


def length(steps: int, batch_size: int, samples: int) -> str:
    return f"{steps:,} steps of {batch_size:,} images = {steps * batch_size / samples:.2f} epochs"


def schedule(settings: TrainConfig) -> str:
    """Learning rate of stage 2 in words."""
    falls = (
        f"halved at {', '.join(map(str, settings.halve_at))}"
        if settings.halve_at
        else f"halved up to {_counted(settings.halvings, 'time')}, when the loss no longer falls"
    )
    return f"rate {settings.lr:g} after {settings.warmup:,} steps of warm-up, {falls}"


def dvae_schedule(settings: DVAETrainConfig) -> str:
    """Learning rate, temperature and KL weight of stage 1 in words."""
    s = settings
    return (
        f"rate {s.lr:g} after {s.warmup:,} steps of warm-up, {s.lr_final:g} at "
        f"{s.lr_steps:,}; temperature {s.temperature:g}, {s.temperature_final:g} at "
        f"{s.temperature_steps:,}; KL weight 0, {s.kl_weight:g} at {s.kl_steps:,}"
    )


def clip_schedule(settings: CLIPTrainConfig) -> str:
    """Learning rate of train-clip in words."""
    s = settings
    return (
        f"rate {s.lr:g} after {s.warmup:,} steps of warm-up, {s.lr_final:g} at {s.lr_steps:,} steps"
    )


def unfinished(settings: DVAETrainConfig) -> str:
    """Which schedules of stage 1 the run is too short for: its codes are then not hard yet."""
    names = ("lr_steps", "temperature_steps", "kl_steps")
    late = [f"dvae_train.{name}" for name in names if getattr(settings, name) > settings.steps]
    return f"THE RUN ENDS BEFORE {', '.join(late)}" if late else ""


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
