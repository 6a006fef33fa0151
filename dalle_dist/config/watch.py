"""The section of what watches a training run (`dalle_dist/watch/`)."""

from __future__ import annotations

from dataclasses import dataclass

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
