"""The block that opens a run, from the stage and the engine that will train it."""

from __future__ import annotations

import math

from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.interface import Engine
from dalle_dist.train import banner
from dalle_dist.train.data import in_flight
from dalle_dist.train.planned import Planned
from dalle_dist.train.stage import Stage


def opening(stage: Stage, ranks: Ranks, engine: Engine, planned: Planned, step: int) -> str:
    """What the run says of itself before its first step; a collective call.

    Args:
        step: that it goes on from.
    """
    settings = stage.settings
    parameters = sum(math.prod(shape) for shape in engine.shapes.values())
    samples, held_out = map(len, stage.datasets)
    micro_batch = settings.batch_size // (ranks.world * engine.accumulation)
    rows = {
        "device": banner.devices(ranks),
        **stage.banner(ranks, parameters),
        "data": banner.images(stage.data_path, samples, held_out),
        "cache": in_flight(stage.datasets[0], ranks),
        "batch": f"{settings.batch_size:,} = {micro_batch} x {ranks.world:,} ranks x "
        f"{engine.accumulation} accumulated",
        "length": banner.length(settings.steps, settings.batch_size, samples),
        "plan": str(planned),
        "from": "the start" if not step else f"step {step:,}",
    }
    return f"training the {stage.title}\n{banner.table(rows)}"
