"""The sampling options: how an image token is chosen from its probabilities.

A new one is a field here, its effect in `sampler.choose`, and an argument of `Generator.generate`.
The command line, the manifest and the grid take it from the field. Read without torch.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field, fields
from typing import Any

from dalle_dist.errors import UserError


def _option(default: float, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Sampling:
    """Raises UserError, naming the command line's flag: an option out of its range."""

    temperature: float = _option(1.0, "divides the logits; 0 = the likeliest token")
    top_k: int = _option(0, "only this many likeliest tokens; 0 = all")
    top_p: float = _option(1.0, "only the fewest likeliest tokens that reach this probability")

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            whole = isinstance(option.default, int)
            if not isinstance(value, numbers.Integral if whole else numbers.Real):
                kind = "an integer" if whole else "a number"
                raise UserError(f"{flag(option.name)}: {value!r} is not {kind}")
            # One number, one type: images are named by these values.
            number: Any = value
            object.__setattr__(self, option.name, int(number) if whole else float(number))
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"--temperature: {self.temperature} is not a number from 0 (the likeliest image) up"
            )
        if self.top_k < 0:
            raise UserError(f"--top-k: {self.top_k} is below 0 (0 keeps all)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p: {self.top_p} is not in (0, 1]")


def flag(name: str) -> str:
    """The command line's spelling of an option."""
    return f"--{name.replace('_', '-')}"
