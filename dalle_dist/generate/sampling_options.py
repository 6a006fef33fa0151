"""The sampling options in force: the config's section `sampling`, and what a call gives instead.

A new one is a field of `SamplingConfig`, its effect in `sampler.py`, and a key of
`SamplingOptions`, which `Generator` takes. The command line, the manifest and the grid take it from
the field. Read without torch.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from dalle_dist.choices import GuidanceSchedule
from dalle_dist.config import SamplingConfig
from dalle_dist.config.options import check_value
from dalle_dist.config.root import keys_of
from dalle_dist.errors import ConfigError

# Share of the way from weight 1 to the full guidance, by share of the image that is generated.
SCHEDULES = {
    "constant": lambda _: 1.0,
    "linear": lambda done: done,
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
}


class SamplingOptions(TypedDict, total=False):
    """What a call may give of them; None is the release's own."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    guidance: float | None
    guidance_schedule: GuidanceSchedule | None


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingConfig):
    """Raises ConfigError, naming the command line's flag: an option out of its range."""

    def __post_init__(self) -> None:
        for name, kind, meaning in keys_of(SamplingConfig):
            value = _plain(flag(name), kind, getattr(self, name))
            check_value(flag(name), kind, value, meaning)
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, defaults: SamplingConfig, **given: Any) -> Sampling:
        """The options that are given, and the defaults for those that are None or left out."""
        chosen = {name: value for name, value in given.items() if value is not None}
        return cls(**(asdict(defaults) | chosen))

    @property
    def guided(self) -> bool:
        """Whether logits for the empty caption are needed too."""
        return self.guidance != 1

    def guidance_at(self, position: int, tokens: int) -> float:
        """The weight for the image token at `position`, of `tokens` in all."""
        done = position / (tokens - 1) if tokens > 1 else 1.0
        share = SCHEDULES[self.guidance_schedule](done)
        return (1 - share) + share * self.guidance


def flag(name: str) -> str:
    """The command line's spelling of an option."""
    return f"--{name.replace('_', '-')}"


def _plain(name: str, kind: Any, value: Any) -> Any:
    """The value as Python's own number: images are named by it."""
    if kind is int and not isinstance(value, numbers.Integral):
        raise ConfigError(f"{name}: {value!r} is not an integer")
    if kind is float and not isinstance(value, numbers.Real):
        raise ConfigError(f"{name}: {value!r} is not a number")
    return kind(value) if kind in (int, float) else value
