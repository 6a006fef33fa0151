"""What is examined: a config on ranks, for one stage; and how answers of ranks become rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dalle_dist.choices import Precision
from dalle_dist.config import Config, StageConfig
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.doctor.meeting import SILENT, Answer, Meeting
from dalle_dist.doctor.report import Row, Verdict
from dalle_dist.precision.hardware import computes_in_bf16
from dalle_dist.stages import StageEntry, stage_of

NO_CONFIG = "no PRESET is given"
# Of paths, by the verb of a stage: what it trains on.
_DATA = {"train": "tokens", "train-dvae": "images", "train-clip": "images"}


@dataclass(frozen=True)
class Patient:
    """A config (or None), for the stage of that verb, on the ranks of a meeting."""

    config: Config | None
    meeting: Meeting
    verb: str

    @property
    def ranks(self) -> Ranks:
        return self.meeting.ranks

    @property
    def settings(self) -> StageConfig | None:
        """The section of the stage."""
        if self.config is None:
            return None
        section: StageConfig = getattr(self.config, self._stage.section)
        return section

    @property
    def precision(self) -> Precision:
        """The stage's; where it is auto, or there is no config: what this rank's device has."""
        settings = self.settings
        if settings is None or settings.precision == "auto":
            return "bf16" if computes_in_bf16(self.ranks.device) else "fp32"
        return settings.precision

    @property
    def run(self) -> str:
        """The stage's run folder; empty without a config."""
        return str(getattr(self.config.paths, self._stage.run)) if self.config else ""

    @property
    def _stage(self) -> StageEntry:
        stage = stage_of(self.verb)
        assert stage is not None
        return stage

    @property
    def data(self) -> str:
        """The folder of what the stage trains on; empty without a config."""
        return str(getattr(self.config.paths, _DATA[self.verb])) if self.config else ""

    def failures(self, check: str, answers: Iterable[Answer]) -> list[Row]:
        """A FAIL row for each error, with its ranks; that a rank is lost has been said before."""
        errors = grouped({a.rank: a.error for a in answers if a.error not in ("", SILENT)})
        return [
            Row(check, Verdict.FAIL, f"{self.meeting.named(ranks)}: {error}")
            for error, ranks in errors.items()
        ]

    def outliers(self, values: Mapping[int, Any]) -> dict[Any, str]:
        """Values that are not those of most ranks, each with its ranks in words."""
        groups = grouped(values)
        usual = max(groups, key=lambda value: len(groups[value]), default=None)
        return {
            value: self.meeting.named(ranks) for value, ranks in groups.items() if value != usual
        }


def grouped(values: Mapping[int, Any]) -> dict[Any, list[int]]:
    """The ranks of each value, in the order in which values first occur."""
    groups: dict[Any, list[int]] = {}
    for rank, value in values.items():
        groups.setdefault(value, []).append(rank)
    return groups


def values_of(answers: Iterable[Answer]) -> dict[int, Any]:
    """By rank, without those that have none."""
    return {answer.rank: answer.value for answer in answers if answer.value is not None}
