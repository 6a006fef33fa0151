"""What can be checked of a run before anything is written."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from dalle_dist.checkpoint.convert import require_checkpoint
from dalle_dist.config import Config
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.deepspeed.async_io import require_async_io
from dalle_dist.errors import ConfigError
from dalle_dist.train.stage import Stage, refuse_endless_warmup
from dalle_dist.train.stop import refuse_stopped


def prepared(
    make: Callable[[Config, Ranks], Stage], config: Config, ranks: Ranks, resume: str | None
) -> Stage:
    """The stage of a run that can begin. Raises UserError: it cannot."""
    stage = make(config, ranks)
    if ranks.rank == 0:
        refuse_stopped(stage.run_path)
        if stage.settings.wandb and importlib.util.find_spec("wandb") is None:
            key = f"{stage.settings.section}.wandb"
            raise ConfigError(f"{key}: the package is not installed; pip install wandb")
    if resume is not None and resume != "auto":
        require_checkpoint(resume)
    refuse_endless_warmup(stage.settings)
    require_async_io(stage.settings.section, stage.settings.deepspeed)
    if ranks.local_rank == 0:
        for dataset in stage.datasets:
            dataset.shards.require_files()
    return stage
