"""A plan: a config on so many GPUs of one kind, counted; nothing is run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dalle_dist.config import Config
from dalle_dist.plan.fits import misfits
from dalle_dist.plan.hardware import Hardware
from dalle_dist.plan.items import Item, Layout
from dalle_dist.plan.memory import GPUMemory, gpu_memory
from dalle_dist.plan.model import Model
from dalle_dist.plan.settings import Settings
from dalle_dist.plan.shares import Share, largest_share
from dalle_dist.plan.storing import PAIRS, checkpoint, disk, host_memory
from dalle_dist.plan.timing import Timing, timing
from dalle_dist.plan.traffic import Traffic, traffic


@dataclass(frozen=True)
class Plan:
    """What a run will need; `settings` and `share` are what was counted with."""

    config: Config
    layout: Layout
    hardware: Hardware
    model: Model
    settings: Settings
    share: Share
    memory: GPUMemory
    host: tuple[Item, ...]
    disk: tuple[Item, ...]
    checkpoint: tuple[Item, ...]
    traffic: Traffic
    timing: Timing
    misfits: tuple[str, ...]

    @property
    def gpu_bytes(self) -> float:
        """At the fullest moment, CUDA's context included."""
        return self.memory.total + self.hardware.context


def plan(
    config: Config,
    layout: Layout,
    hardware: Hardware,
    *,
    model: Model | None = None,
    pairs: int = PAIRS,
) -> Plan:
    """Count what the training of stage 2 needs.

    Args:
        model: that of the config, where it was built before.
        pairs: of the data set, for the bytes of shards.

    Raises:
        ConfigError: the config cannot run on so many ranks, or has what is not counted here.
    """
    model = model or Model.of(config)
    settings = Settings.of(config, layout, hardware.bf16)
    settings = replace(settings, fp16_by_fp32=hardware.device == "cpu")
    share = largest_share(config, model, settings.sharing)
    memory = gpu_memory(config, model, settings, share)
    sent = traffic(config, model, settings, share, layout)
    return Plan(
        config,
        layout,
        hardware,
        model,
        settings,
        share,
        memory,
        host_memory(config, model, settings, layout),
        disk(config, model, settings, pairs),
        checkpoint(config, model, settings),
        sent,
        timing(config, model, settings, share, sent, layout, hardware),
        misfits(config, settings, memory, hardware),
    )
