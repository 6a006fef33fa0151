"""What keys of the config ask of one another; bounds of single keys are with their fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalle_dist.config.clip import CLIPConfig
from dalle_dist.config.sections import HEAD_DIM, DVAEConfig, TransformerConfig
from dalle_dist.config.stage import StageConfig
from dalle_dist.errors import ConfigError

if TYPE_CHECKING:
    from dalle_dist.config.root import Config


def check_together(config: Config) -> None:
    """Raises ConfigError when values that are allowed by themselves do not fit one another."""
    _transformer(config.transformer)
    _dvae(config.dvae)
    if config.image_tokenizer.kind == "dvae":
        _image_tokens(config.transformer, config.dvae)
    for section in vars(config).values():
        if isinstance(section, StageConfig):
            _stage(section)
    _clip(config.clip)
    rows, grid = config.train.completion_rows, config.transformer.image_grid
    _require(
        rows < grid or rows == 0,
        f"train.completion_rows: {rows} is not below transformer.image_grid {grid}",
    )
    for crops in (config.dvae_train, config.clip_train):
        low, high, name = crops.crop_min, crops.crop_max, crops.section
        _require(low <= high, f"{name}.crop_min: {low} is above {name}.crop_max {high}")


def _transformer(shape: TransformerConfig) -> None:
    _require(
        shape.heads * HEAD_DIM == shape.width or shape.architecture != "paper",
        f"transformer.width: {shape.width} is not transformer.heads x {HEAD_DIM} "
        f"= {shape.heads * HEAD_DIM}",
    )
    _require(shape.conv_kernel % 2 == 1, f"transformer.conv_kernel: {shape.conv_kernel} is not odd")


def _dvae(shape: DVAEConfig) -> None:
    _require(
        shape.grid > 0 and shape.image_size == shape.grid << shape.downsamplings,
        f"dvae.image_size: {shape.image_size} is not a multiple of 2**dvae.downsamplings = "
        f"{2**shape.downsamplings}",
    )
    _require(shape.width % 4 == 0, f"dvae.width: {shape.width} is not a multiple of 4")


def _clip(shape: CLIPConfig) -> None:
    for whole, part in (
        ("image_size", "patch_size"),
        ("image_width", "image_heads"),
        ("text_width", "text_heads"),
    ):
        value, divisor = getattr(shape, whole), getattr(shape, part)
        _require(
            value % divisor == 0,
            f"clip.{whole}: {value} is not a multiple of clip.{part} {divisor}",
        )


def _image_tokens(transformer: TransformerConfig, dvae: DVAEConfig) -> None:
    _require(
        transformer.image_grid == dvae.grid,
        f"transformer.image_grid: {transformer.image_grid}, but the dVAE gives {dvae.grid} "
        f"(dvae.image_size {dvae.image_size} / 2**{dvae.downsamplings})",
    )
    _require(
        transformer.codebook_size == dvae.codebook_size,
        f"transformer.codebook_size: {transformer.codebook_size} is not dvae.codebook_size "
        f"{dvae.codebook_size}",
    )


def _stage(stage: StageConfig) -> None:
    name, batch, micro = stage.section, stage.batch_size, stage.micro_batch
    _require(
        micro == 0 or batch % micro == 0,
        f"{name}.batch_size: {batch} is not a multiple of {name}.micro_batch {micro}",
    )
    zero = stage.deepspeed.get("zero_optimization", {})
    found = zero.get("stage", "auto") if isinstance(zero, dict) else "auto"
    _require(
        found in (stage.zero_stage, "auto"),
        f"{name}.deepspeed: zero_optimization.stage is {found!r}, but {name}.zero_stage is "
        f"{stage.zero_stage}; change one of them, or remove the key from {name}.deepspeed",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
