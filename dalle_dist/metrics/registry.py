"""Validation measures of stage 2 by name, the values of the config's `train.metrics`.

A new one is a function here, or in a file of its own, and one entry in METRICS. A forward pass of
the engine gives the sums and counts of both losses; what needs logits extends
`transformer/training.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dalle_dist.data.loader import TokenDataset
from dalle_dist.distributed.launch import Ranks
from dalle_dist.engine.interface import Engine
from dalle_dist.errors import ConfigError
from dalle_dist.metrics.captions import caption_cycle
from dalle_dist.metrics.held_out import MOST, held_out_losses

# (engine, held-out set, micro-batch, ranks) to numbers for the log; a collective call.
Metric = Callable[[Engine, TokenDataset, int, Ranks], dict[str, float]]


def losses(
    engine: Engine, held_out: TokenDataset, micro_batch: int, ranks: Ranks
) -> dict[str, float]:
    """`held_out_text` and `held_out_image`: nats per token."""
    text, image = held_out_losses(engine, held_out, micro_batch, ranks)
    return {"held_out_text": text, "held_out_image": image}


def caption_gain(
    engine: Engine, held_out: TokenDataset, micro_batch: int, ranks: Ranks
) -> dict[str, float]:
    """`caption_gain`: nats per image token that the right captions are worth."""
    other = caption_cycle(min(MOST, len(held_out)), seed=0).tolist()
    _, right = held_out_losses(engine, held_out, micro_batch, ranks)
    _, wrong = held_out_losses(engine, held_out, micro_batch, ranks, other.__getitem__)
    return {"caption_gain": wrong - right}


METRICS: dict[str, Metric] = {"losses": losses, "caption_gain": caption_gain}


def measure(
    names: Sequence[str], engine: Engine, held_out: TokenDataset, micro_batch: int, ranks: Ranks
) -> dict[str, float]:
    """All metrics of these names. Raises ConfigError: no such metric."""
    check(names)
    found: dict[str, float] = {}
    for name in names:
        found |= METRICS[name](engine, held_out, micro_batch, ranks)
    return found


def check(names: Sequence[str]) -> None:
    """Raises ConfigError: no such metric."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"train.metrics: '{name}' is not one of {', '.join(METRICS)}")
