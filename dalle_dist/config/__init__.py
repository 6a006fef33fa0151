"""The one source of truth of a run: typed, documented, checked settings <-> YAML.

`options.py` has what a key means and may be, `sections.py`, `stages.py`, `clip.py` and `watch.py`
the keys,
`root.py` the whole `Config`, `cross_checks.py` what keys ask of one another, `presets.py` and
`loading.py` the way from YAML and overrides to a `Config`, `docs.py` its documentation.
"""

from dalle_dist.config.clip import CLIPConfig, CLIPTrainConfig
from dalle_dist.config.loading import (
    difference,
    from_dict,
    load,
    section_differences,
    to_dict,
    to_yaml,
)
from dalle_dist.config.presets import preset_names
from dalle_dist.config.root import Config, validate
from dalle_dist.config.sections import (
    HEAD_DIM,
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
from dalle_dist.config.stage import StageConfig
from dalle_dist.config.stages import DVAETrainConfig, TrainConfig
from dalle_dist.config.watch import WatchConfig

__all__ = [
    "HEAD_DIM",
    "CLIPConfig",
    "CLIPTrainConfig",
    "Config",
    "DVAEConfig",
    "DVAETrainConfig",
    "DataConfig",
    "ImageTokenizerConfig",
    "InteropConfig",
    "ParallelConfig",
    "PathsConfig",
    "SamplingConfig",
    "StageConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TransformerConfig",
    "WatchConfig",
    "difference",
    "from_dict",
    "load",
    "preset_names",
    "section_differences",
    "to_dict",
    "to_yaml",
    "validate",
]
