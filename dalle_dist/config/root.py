"""The whole config of a run: nested, typed, frozen dataclasses, checked when made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_type_hints

from dalle_dist.config.clip import CLIPConfig, CLIPTrainConfig
from dalle_dist.config.cross_checks import check_together
from dalle_dist.config.options import Option, check_value, option, option_of
from dalle_dist.config.sections import (
    DataConfig,
    DVAEConfig,
    ImageTokenizerConfig,
    InteropConfig,
    ParallelConfig,
    PathsConfig,
    SamplingConfig,
    TokenizerConfig,
    TransformerConfig,
)
from dalle_dist.config.stages import DVAETrainConfig, TrainConfig
from dalle_dist.config.watch import WatchConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of all stages. Raises ConfigError when one is not allowed."""

    name: str = option("custom", "name of the run in reports and logs")
    seed: int = option(
        0,
        "what order, augmentation, dropout, noise and samples are derived from",
        at_least=0,
        below=2**32,
    )
    paths: PathsConfig = field(default_factory=PathsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    dvae: DVAEConfig = field(default_factory=DVAEConfig)
    dvae_train: DVAETrainConfig = field(default_factory=DVAETrainConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    interop: InteropConfig = field(default_factory=InteropConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    clip_train: CLIPTrainConfig = field(default_factory=CLIPTrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        validate(self)


def validate(config: Config) -> None:
    """Check each value by itself, then those that must fit one another. Raises ConfigError."""
    sections = {f"{name}.": getattr(config, name) for name in section_names()}
    for prefix, section in {"": config, **sections}.items():
        for key, kind, meaning in keys_of(type(section)):
            check_value(f"{prefix}{key}", kind, getattr(section, key), meaning)
    check_together(config)


def keys_of(section: type) -> Iterator[tuple[str, Any, Option]]:
    """Name, type and meaning of each key of a section, in its order; without sections inside."""
    for entry in dataclasses.fields(section):
        if entry.name not in section_names() or section is not Config:
            yield entry.name, hints(section)[entry.name], option_of(entry)


@cache
def hints(section: type) -> dict[str, Any]:
    """Types of a section's keys."""
    return get_type_hints(section)


@cache
def section_names() -> dict[str, type]:
    """Class of each section, by its name."""
    found = hints(Config)
    return {name: kind for name, kind in found.items() if dataclasses.is_dataclass(kind)}  # type: ignore[misc]
