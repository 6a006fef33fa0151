"""What is not finite in a run: steps that are skipped, how many of them, and the run's end."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dalle_dist.data.loader import described
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import UserError
from dalle_dist.train.data import TrainingSet

WINDOW = 2_000  # steps; the first scales of fp16 may be halved for some hundreds of them


class Skips:
    """Counts them. Raises UserError when a run learns nothing any more.

    Args:
        path: of the run, for errors.
        section: of the config, for errors.
        budget: steps with a loss that is not finite which may be skipped.
    """

    def __init__(self, path: str, section: str, budget: int) -> None:
        self._path, self._section, self._budget = path, section, budget
        self.bad_losses, self._steps, self._skipped = 0, 0, 0
        self._recent: deque[bool] = deque(maxlen=WINDOW)

    def add(self, skipped: bool, bad_loss: bool) -> None:
        """Take note of a step.

        Raises UserError: one more loss that is not finite than may be, or most of the last steps
        were skipped.
        """
        self.bad_losses += bad_loss
        self._steps, self._skipped = self._steps + 1, self._skipped + skipped
        self._recent.append(skipped)
        if self.bad_losses > self._budget:
            raise UserError(
                f"{self._path}: the loss was not finite in {self.bad_losses} steps, and "
                f"{self._section}.skip_budget is {self._budget}; resume from the last "
                f"checkpoint with a lower {self._section}.lr, or look at the samples that the log "
                "names (bad_samples)"
            )
        if len(self._recent) == WINDOW and sum(self._recent) > WINDOW // 2:
            raise UserError(self._most(f"the last {WINDOW:,} steps"))

    def refuse_most(self) -> None:
        """Raises UserError: most steps since this process began were skipped."""
        if self._skipped > self._steps / 2:
            raise UserError(self._most(f"{self._steps:,} steps"))

    def _most(self, which: str) -> str:
        return (
            f"{self._path}: most of {which} were skipped, for gradients or losses that were not "
            f"finite; the model has learned next to nothing. Lower {self._section}.lr, or take "
            f"{self._section}.precision=bf16"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"bad_losses": self.bad_losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bad_losses = state["bad_losses"]


class LastNorm:
    """The last gradient's norm, looked at when the host need not wait for it any more.

    Args:
        path: of the run, for errors.
        section: of the config, for errors.
    """

    def __init__(self, path: str, section: str) -> None:
        self._path, self._section = path, section
        self._norm: Tensor | None = None
        self._step = 0

    def take(self, norm: Tensor, step: int, skipped: bool) -> None:
        self._norm, self._step = None if skipped else norm, step

    def check(self) -> None:
        """Raise UserError if it is not finite: the weights are lost then."""
        norm, self._norm = 0.0 if self._norm is None else self._norm.item(), None
        if not math.isfinite(norm):
            raise UserError(
                f"{self._path}: gradient norm {norm:g} at step {self._step}; resume from the last "
                f"checkpoint with a lower {self._section}.lr"
            )


def samples_of(
    dataset: TrainingSet, suspects: Sequence[int], first: int, micro_batch: int, ranks: Ranks
) -> list[str]:
    """Samples of all ranks' suspect micro-batches, in words; a collective call.

    Args:
        suspects: this rank's, by their number in the step.
        first: position of the first sample of the step.
    """
    stretch, mine = ranks.world * micro_batch, []
    for number in suspects:
        begin = first + number * stretch
        positions = range(begin + ranks.rank, begin + stretch, ranks.world)
        mine += [described(dataset, position) for position in positions]
    return [name for names in ranks.gather(mine) for name in names]
