"""Bytes of host memory of a node, and of what lies on disks or in a store."""

from __future__ import annotations

from dalle_dist.config import Config
from dalle_dist.plan.items import Item, Layout, nonzero
from dalle_dist.plan.model import Model
from dalle_dist.plan.settings import Settings

PAIRS = 250_000_000  # of the paper (B.2)
# Counted on Linux: a process that has imported torch and DeepSpeed, and a loader that was forked
# off it and has unshared what it writes to; a CUDA context's host part is assumed.
PROCESS, LOADER, CUDA_HOST = 0.9e9, 0.25e9, 1.5e9
IMAGE = 75_000  # bytes of a JPEG of 384 pixels with its caption: assumed; inspect says what is true
BLOCK = 512  # a tar's: each file has a header of one, and fills up to whole ones


def checkpoint(config: Config, model: Model, settings: Settings) -> tuple[Item, ...]:
    """One checkpoint, over all ranks; each element once."""
    narrow = 2 if settings.train.moments == "16-bit" else 4
    matrices, others = model.matrices, model.others
    errors = matrices if settings.between == "powersgd" else 0
    outer = model.parameters if settings.between == "diloco" else 0
    return nonzero(
        Item("weights", 4 * model.parameters, f"{model.parameters:,} x 4 B"),
        Item(
            "moments",
            2 * (narrow * matrices + 4 * others),
            f"{matrices:,} x 2 x {narrow} B, {others:,} x 2 x 4 B",
        ),
        Item("moving average", 4 * model.parameters, f"{model.parameters:,} x 4 B"),
        Item("mean errors", 4 * errors, f"{errors:,} x 4 B"),
        Item("outer momentum", 4 * outer, f"{outer:,} x 4 B"),
    )


def host_memory(
    config: Config, model: Model, settings: Settings, layout: Layout
) -> tuple[Item, ...]:
    """Of one node."""
    gpus, workers = layout.gpus_per_node, config.data.workers
    saved = sum(item.amount for item in checkpoint(config, model, settings))
    staged = saved / layout.nodes
    largest = max(model.sizes.values())
    fresh = 4 * (largest if settings.stage == 3 else model.parameters)
    what = "the largest parameter" if settings.stage == 3 else "the whole model"
    return nonzero(
        Item("ranks", gpus * (PROCESS + CUDA_HOST), f"{gpus} processes x 2.4 GB (assumed)"),
        Item("loaders", gpus * workers * LOADER, f"{gpus} x {workers} processes x 0.25 GB"),
        Item("copy of a save", staged, f"{saved / 1e9:,.1f} GB / {layout.nodes} nodes, pinned"),
        Item("fresh weights", gpus * fresh, f"{what}, on {gpus} ranks, at the start"),
    )


def disk(config: Config, model: Model, settings: Settings, pairs: int = PAIRS) -> tuple[Item, ...]:
    one = sum(item.amount for item in checkpoint(config, model, settings))
    train = settings.train
    kept = train.keep + (train.steps // train.keep_every if train.keep_every else 0)
    kept = min(kept, -(-train.steps // train.save_every))
    token = _in_tar(128 + 2 * config.transformer.image_tokens) + 2 * _in_tar(100)
    return (
        Item("image shards", pairs * IMAGE, f"{pairs:,} pairs x {IMAGE:,} B (assumed)"),
        Item("token shards", pairs * token, f"{pairs:,} pairs x {token:,} B in tars"),
        Item("one checkpoint", one, "weights, moments, moving average, mean errors"),
        Item("checkpoints that are kept", kept * one, f"{kept} of them, and one being written"),
        Item("release", 4 * model.parameters, f"{model.parameters:,} x 4 B"),
    )


def _in_tar(size: int) -> int:
    return BLOCK + -(-size // BLOCK) * BLOCK
