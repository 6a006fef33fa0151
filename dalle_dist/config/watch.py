"""The section of what watches a training run (`dalle_dist/watch/`)."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_dist.choices import OnSpike
from dalle_dist.config.options import option


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a run counts as hung, and a rank as slow."""

    hang_after: float = option(
        600.0,
        "a step that takes longer than this ends the run on all ranks, with a message that says "
        "where each of them is, and status 75; 0 = never",
        unit="seconds",
        at_least=0,
    )
    hang_after_others: float = option(
        3600.0,
        "the same for all that is not such a step: the start, the first step, which may compile, "
        "each save, evaluation, sheet of samples and release; 0 = never",
        unit="seconds",
        at_least=0,
    )
    slow_rank: float = option(
        1.5,
        "a rank whose own work takes this many times as long as the median rank's is named",
        unit="x",
        above=1,
    )
    spike: float = option(
        10.0,
        "how many standard deviations above the median of 200 steps a loss is too high; one that "
        "is not finite always is. 0 = no loss that is finite",
        unit="standard deviations",
        at_least=0,
    )
    spike_steps: int = option(
        5, "steps in a row whose loss is too high that make a spike", unit="steps", at_least=1
    )
    on_spike: OnSpike = option(
        "warn",
        "what a run does about a spike: warn = say so; rollback = go back to the last checkpoint "
        "from before it, and go on with the samples that come after it",
        source="rollback: PaLM (arXiv 2204.02311, 5.1)",
    )
    rollbacks: int = option(3, "rollbacks in a run; one more ends it", unit="rollbacks", at_least=0)
