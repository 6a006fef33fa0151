"""What a schedule has that depends on the optimizer step alone: nothing to note or to keep."""

from __future__ import annotations

from typing import Any


class Stateless:
    """The part of `train.stage.Schedule` beside `rate`."""

    def observe(self, step: int, loss: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
