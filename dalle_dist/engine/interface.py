"""What the training loop and checkpoints ask of an engine, whatever library shards the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from dalle_dist.gradients.piece import Piece, ReadPieces
from dalle_dist.gradients.scaling import Telemetry

WEIGHTS, MEAN, VARIANCE = "weights", "exp_avg", "exp_avg_sq"
STATE = (WEIGHTS, MEAN, VARIANCE)


@dataclass
class Restoring:
    """What is being replaced of an engine's state.

    share  of each kind of `STATE`, this rank's pieces, as views to be filled
    steps  that the optimizer has made, to be set; None: as it is
    """

    share: dict[str, list[Piece]]
    steps: int | None = None


class Engine(Protocol):
    """A model whose weights, gradients and moments may be sharded over ranks.

    Per optimizer step: `accumulation` times a call of the engine and `backward`, then `reduce` and
    `apply`, or both as `step`.

    module         the model, in training mode
    shapes         whole shape of each parameter, by name
    accumulation   micro-batches of one optimizer step on each rank
    zero_stage     0: every rank has all optimizer state; 1, 2, 3: ZeRO's stages
    shard_rank     rank among those that share the weights between them ...
    shard_world    ... and how many they are
    nodes          how many hold replicas of the weights, each as a whole; 1: ZeRO shards over all
    optimizer      name of the optimizer
    optimizer_steps  steps that it has made, those that were skipped apart
    settled        whether replicas have the same weights: False between DiLoCo's outer steps
    skipped        whether the last `step` left every weight and moment as it was
    """

    accumulation: int
    zero_stage: int
    shapes: dict[str, tuple[int, ...]]
    shard_rank: int
    shard_world: int
    nodes: int
    optimizer: str
    skipped: bool

    @property
    def optimizer_steps(self) -> int: ...

    @property
    def settled(self) -> bool: ...

    @property
    def module(self) -> nn.Module: ...

    def __call__(self, *inputs: Any) -> Tensor:
        """Forward pass of this rank's micro-batch."""

    def backward(self, loss: Tensor, hold: bool = False) -> None:
        """Add the gradient of this micro-batch's share of the global loss.

        The shares of all micro-batches of all ranks add up to the loss. In the pass of the last
        micro-batch gradients may already go to other nodes, changed: `gradients` is not to be
        called before `reduce`, which cannot `measure` either, unless it is told to `hold` them.
        """

    def reduce(self, sums: Tensor | None = None, measure: bool = False) -> list[float]:
        """Transform the gradients; whether they are finite is agreed over all ranks.

        With it, in the same all-reduce, `sums`, fp64 [n] on the ranks' device, are summed over all
        ranks, and come back as numbers: the one time in a step that the host waits for the device.
        Where one of them is not finite, the step is skipped. `measure` renews what `telemetry`
        tells.
        """

    def apply(self, lr: float) -> Tensor:
        """Clip and apply the gradients, after `reduce`; gives their norm before clipping.

        A tensor of no dimension, for which the host need not wait. Where nodes train apart, it is
        that of the node, and an outer step follows if one is due.
        """

    def settle(self) -> None:
        """Have all replicas go on from the same weights, if they do not; a collective call."""

    def step(self, lr: float, measure: bool = False) -> float:
        """`reduce` and `apply`; the norm, waited for."""

    def gradients(self) -> list[Piece]:
        """The reduced fp32 gradients that this rank owns, as views, after the last `backward`."""

    def weights(self) -> list[Piece]:
        """This rank's share of the fp32 weights, as views: over all ranks, each element once."""

    def state(self) -> dict[str, list[Piece]]:
        """This rank's share of what a checkpoint keeps of each element: `STATE`, as `weights`.

        Values are views of the live ones: weights in fp32, moments in fp32 or packed in 16 bits.
        """

    def restoring(self) -> AbstractContextManager[Restoring]:
        """To replace the state: each rank fills its share, then all replicas have it."""

    def telemetry(self) -> Telemetry:
        """What the gradient transforms have to say for the log."""

    def sampling_model(
        self, build: Callable[[], nn.Module]
    ) -> AbstractContextManager[nn.Module | None]:
        """On rank 0 a model with the present weights that needs no other rank; None elsewhere."""

    def refuse_diverged(self) -> None:
        """Raise CheckpointError on all ranks when replicas' weights differ; a collective call."""

    def transform_state(self) -> tuple[dict[str, Any], dict[str, list[Piece]]]:
        """State of the gradient transforms: (numbers, tensors by kind); a collective call.

        Numbers, nested, are the same on all ranks. Of the tensors each rank has its share.
        """

    def load_transform_state(self, numbers: Mapping[str, Any], read: ReadPieces) -> None:
        """Take over what `transform_state` gave, on any number of ranks and nodes.

        `read` fills pieces of a kind of tensors from the checkpoint.
        """
