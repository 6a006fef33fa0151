"""What the training loop and checkpoints ask of an engine, whatever library shards the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from dalle_dist.gradients.piece import Piece
from dalle_dist.gradients.scaling import Telemetry


class Engine(Protocol):
    """A model whose weights, gradients and moments may be sharded over ranks.

    Per optimizer step: `accumulation` times a call of the engine and `backward`, then one `step`.

    module         the model, in training mode
    shapes         whole shape of each parameter, by name
    accumulation   micro-batches of one optimizer step on each rank
    zero_stage     0: every rank has all optimizer state; 1, 2, 3: ZeRO's stages
    shard_rank     rank among those that share the weights between them ...
    shard_world    ... and how many they are
    node           number of this rank's node where nodes hold replicas of the weights, else 0
    optimizer      name of the optimizer, whose state `save` writes
    skipped        whether the last `step` left every weight and moment as it was
    """

    accumulation: int
    zero_stage: int
    shapes: dict[str, tuple[int, ...]]
    shard_rank: int
    shard_world: int
    node: int
    optimizer: str
    skipped: bool

    @property
    def module(self) -> nn.Module: ...

    def __call__(self, *inputs: Any) -> Tensor:
        """Forward pass of this rank's micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this micro-batch's share of the global loss.

        The shares of all micro-batches of all ranks add up to the loss.
        """

    def step(self, lr: float, measure: bool = False) -> float:
        """Transform, clip and apply the gradients; returns their norm before clipping.

        `measure` renews what `telemetry` tells.
        """

    def gradients(self) -> list[Piece]:
        """The reduced fp32 gradients that this rank owns, as views, after the last `backward`."""

    def weights(self) -> list[Piece]:
        """The fp32 weights that this rank owns, as views; a node's pieces cover each one once."""

    def telemetry(self) -> Telemetry:
        """What the gradient transforms have to say for the log."""

    def sampling_model(
        self, build: Callable[[], nn.Module]
    ) -> AbstractContextManager[nn.Module | None]:
        """On rank 0 a model with the present weights that needs no other rank; None elsewhere."""

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state below `folder`; all ranks together.

        Raises what went wrong on this rank only after all ranks are through.
        """

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote, bit for bit. Raises CheckpointError when it does not fit."""

    def transform_state(self) -> dict[str, Any]:
        """State of the gradient transforms: numbers and CPU tensors, nested; a collective call."""

    def load_transform_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `transform_state` gave, on any number of nodes."""
