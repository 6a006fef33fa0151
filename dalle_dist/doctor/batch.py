"""Whether the batch and DeepSpeed's settings fit so many ranks: a run would refuse them later."""

from __future__ import annotations

from dataclasses import replace

from dalle_dist.doctor.patient import NO_CONFIG, Patient
from dalle_dist.doctor.report import Row, Verdict
from dalle_dist.engine.deepspeed.settings import (
    accumulation,
    check_together,
    deepspeed_config,
    micro_batch,
)
from dalle_dist.errors import ConfigError

NAME = "batch"


def batch(patient: Patient) -> list[Row]:
    """One row."""
    settings, config, world = patient.settings, patient.config, patient.ranks.world
    if settings is None or config is None:
        return [Row(NAME, Verdict.SKIP, NO_CONFIG)]
    settings = replace(settings, precision=patient.precision)
    try:
        tree = deepspeed_config(settings, world)
        if patient.verb == "train":  # the other stages have no means between nodes
            check_together(settings, config.parallel, tree)
    except ConfigError as error:
        return [Row(NAME, Verdict.FAIL, str(error), "what a run takes")]
    micro, steps = micro_batch(settings, world), accumulation(settings, world)
    text = f"{settings.batch_size:,} samples = {world:,} ranks x {steps:,} x {micro:,}"
    return [Row(NAME, Verdict.OK, text)]
