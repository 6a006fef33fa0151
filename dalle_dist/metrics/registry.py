"""Validation measures of stage 2 by name, the values of the config's `train.metrics`.

A new one is a function here, or in a file of its own, and one entry in METRICS. A forward pass of
the engine gives the sums and counts of both losses; what needs logits extends
`transformer/loss_model.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from dalle_dist.data.loader import TokenDataset
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.interface import Engine
from dalle_dist.errors import ConfigError
from dalle_dist.metrics.caption_gain import caption_cycle
from dalle_dist.metrics.held_out import MOST, held_out_losses


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: what measures look at, and what several of them need, found once."""

    engine: Engine
    held_out: TokenDataset
    micro_batch: int
    ranks: Ranks

    @cached_property
    def losses(self) -> tuple[float, float]:
        """Nats per text token and per image token, each image with its own caption."""
        return self._losses(None)

    @cached_property
    def losses_shuffled(self) -> tuple[float, float]:
        """The same, each image with another's caption."""
        other = caption_cycle(min(MOST, len(self.held_out)), seed=0).tolist()
        return self._losses(other.__getitem__)

    def _losses(self, caption_of: Callable[[int], int] | None) -> tuple[float, float]:
        return held_out_losses(self.engine, self.held_out, self.micro_batch, self.ranks, caption_of)


# To numbers for the log; a collective call.
Metric = Callable[[Evaluation], dict[str, float]]


def losses(evaluation: Evaluation) -> dict[str, float]:
    """`held_out_text` and `held_out_image`: nats per token."""
    text, image = evaluation.losses
    return {"held_out_text": text, "held_out_image": image}


def caption_gain(evaluation: Evaluation) -> dict[str, float]:
    """`caption_gain`: nats per image token that the right captions are worth."""
    return {"caption_gain": evaluation.losses_shuffled[1] - evaluation.losses[1]}


METRICS: dict[str, Metric] = {"losses": losses, "caption_gain": caption_gain}


def measure(names: Sequence[str], evaluation: Evaluation) -> dict[str, float]:
    """All metrics of these names. Raises ConfigError: no such metric."""
    check(names)
    found: dict[str, float] = {}
    for name in names:
        found |= METRICS[name](evaluation)
    return found


def check(names: Sequence[str]) -> None:
    """Raises ConfigError: no such metric."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"train.metrics: '{name}' is not one of {', '.join(METRICS)}")
