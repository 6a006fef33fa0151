"""What the training loop asks of a training stage: its data, its model, its loss, its measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor

from dalle_dist.config import Config, StageConfig
from dalle_dist.data.image_dataset import ImageDataset
from dalle_dist.data.loader import Samples
from dalle_dist.data.token_dataset import TokenDataset
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.interface import Engine
from dalle_dist.errors import ConfigError
from dalle_dist.optim.ema import EMA
from dalle_dist.train.data import Progress
from dalle_dist.train.planned import Planned
from dalle_dist.train.state import Identity, TrainingState


class Schedule(Protocol):
    """Learning rate of each optimizer step, counted from 1."""

    def rate(self, step: int) -> float: ...

    def observe(self, step: int, loss: float) -> None:
        """Take note of the training loss of a finished step, the same on all ranks."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stage(ABC):
    """One of the programs that train a model; `loop.py` runs it.

    Made before anything is written, on all ranks: what is wrong with the inputs is raised then.

    kind          name in checkpoints: which stage wrote one
    title         what is trained, in words
    sections      sections of the config that a resumed run must not change
    config        of the run
    settings      this stage's section of it
    precision     in which the model computes, in words
    dtype         of its matrix products
    tokens        per sample that the model is trained on; 0: it is not trained on tokens
    between_nodes a value of `parallel.between_nodes`
    run_path      the run's folder
    data_path     folder of the shards
    fingerprints  of what the model was trained with, by name: must be the same in a resumed run
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    sections: ClassVar[tuple[str, ...]]
    config: Config
    settings: StageConfig
    precision: str
    dtype: torch.dtype
    tokens: int = 0
    between_nodes: str = "zero"
    run_path: str
    data_path: str
    fingerprints: Mapping[str, str]

    @property
    @abstractmethod
    def datasets(self) -> tuple[ImageDataset | TokenDataset, ImageDataset | TokenDataset]:
        """Training set and held-out set."""

    @abstractmethod
    def build_engine(self, ranks: Ranks) -> Engine:
        """The model with its first weights, under an engine."""

    @abstractmethod
    def schedule(self) -> Schedule: ...

    @abstractmethod
    def collate(self, samples: Samples[Any]) -> Any:
        """A micro-batch of samples of the training set."""

    def counts(self, micro_batches: Sequence[Any]) -> list[float]:
        """What must be counted over all ranks before the first forward pass of a step."""
        return []

    @abstractmethod
    def loss(
        self, engine: Engine, micro_batch: Any, counts: Sequence[float], step: int
    ) -> tuple[Tensor, Tensor]:
        """(this micro-batch's share of the loss, its shares of the terms that `numbers` names).

        Args:
            counts: summed over all micro-batches of all ranks.
            step: the optimizer step that is being made, from 1.
        """

    @abstractmethod
    def numbers(self, terms: Sequence[float], step: int) -> dict[str, float]:
        """For the log, from the terms summed over all micro-batches of all ranks: `loss`, ..."""

    @abstractmethod
    def flop(self, device: torch.device) -> float:
        """Model FLOP of the forward and backward pass of one sample; `device` may count them."""

    @abstractmethod
    def validate(self, state: TrainingState) -> dict[str, float]:
        """Measures on the held-out set, for the log; a collective call."""

    def alarm(
        self, step: int, measures: Mapping[str, float], log: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, float], str]:
        """What is wrong with these measures: (numbers for the log, one line or "").

        Args:
            measures: what `validate` found after this step.
            log: the run's lines so far, also those of before it was resumed.
        """
        return {}, ""

    @abstractmethod
    def sample(self, state: TrainingState) -> dict[str, Image.Image]:
        """Images to look at, by name; on rank 0, empty elsewhere; a collective call."""

    def data_measures(self, ranks: Ranks) -> dict[str, float]:
        """What is known of the training set before the first step, for the log; on rank 0."""
        return {}

    @property
    def texts(self) -> dict[str, str]:
        """Texts for TensorBoard, by name, in Markdown."""
        return {}

    @abstractmethod
    def banner(self, ranks: Ranks, parameters: int) -> dict[str, str]:
        """What the run says of itself before its first step: rows of name and text."""

    def planned(self, ranks: Ranks) -> Planned:
        """What this run was expected to take; a collective call."""
        return Planned(None)

    @property
    def identity(self) -> Identity:
        """What a checkpoint to go on from must have in common with this run."""
        return Identity(
            self.kind,
            self.config,
            self.settings,
            self.precision,
            self.between_nodes,
            self.sections,
            self.fingerprints,
        )

    @property
    def alone(self) -> bool:
        """Whether a rank waits for no other in a forward pass."""
        return self.settings.zero_stage < 3

    def progress(self) -> Progress:
        """Of a run that starts."""
        return Progress.start(self.datasets[0], self.settings)

    def ema(self) -> EMA:
        return EMA(self.settings.ema, "cpu" if self.settings.ema_on == "host" else None)


def refuse_endless_warmup(settings: StageConfig) -> None:
    """Raise ConfigError for a run that would end before its learning rate has risen.

    Asked of a run that starts, not of every config: releases of older runs stay readable.
    """
    if settings.warmup > settings.steps:
        key = f"{settings.section}.warmup"
        raise ConfigError(
            f"{key}: {settings.warmup} steps of warm-up in a run of {settings.steps}; set it too, "
            f"e.g. {key}={settings.steps // 20}"
        )
