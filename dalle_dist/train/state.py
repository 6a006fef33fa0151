"""What a checkpoint of any stage holds, and who may go on from it.

step-00001000/deepspeed/       weights, moments and master weights as DeepSpeed keeps them
             /weights/         fp32 pieces, raw and averaged (see checkpoint/weights.py)
             /gradients/       gradient scales, and the nodes' mean error of PowerSGD
             /training.json    step, schedule, samples consumed and their order, how it was made
             /config.yaml      the config in force
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml
from torch import Tensor

from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.convert import TRAINING, read_training
from dalle_dist.checkpoint.formats import SUFFIX, load_tree, save_tree
from dalle_dist.checkpoint.release import CONFIG
from dalle_dist.checkpoint.weights import load_pieces, save_pieces
from dalle_dist.config import (
    Config,
    StageConfig,
    difference,
    section_differences,
    to_dict,
    to_yaml,
)
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.interface import Engine
from dalle_dist.errors import CheckpointError, ConfigError, UserError
from dalle_dist.gradients.piece import assemble
from dalle_dist.optim.ema import EMA
from dalle_dist.train.data import Progress


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Identity:
    """What a run is: a checkpoint of another one is refused.

    stage         name of the training stage
    config        of the run; of its `sections` every key must be the same
    settings      the stage's section of it
    precision     in which the model computes
    between_nodes how nodes work together, a value of `parallel.between_nodes`
    fingerprints  of what the model is trained with, by name
    """

    stage: str
    config: Config
    settings: StageConfig
    precision: str
    between_nodes: str = "zero"
    sections: tuple[str, ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)


class TrainingState:
    """Everything that changes from step to step, written and read as one checkpoint."""

    def __init__(
        self,
        identity: Identity,
        ranks: Ranks,
        engine: Engine,
        ema: EMA,
        schedule: Stateful,
        progress: Progress,
    ) -> None:
        self.progress = progress
        self.identity, self.ranks, self.engine = identity, ranks, engine
        self.ema, self.schedule = ema, schedule
        self.step = 0  # finished

    def save(self, checkpoints: Path) -> Path:
        """Write a checkpoint; all ranks. Raises CheckpointError on all when one could not."""
        return store.save(
            checkpoints, self.step, self._write, self.ranks, self.identity.settings.keep
        )

    def load(self, checkpoint: Path, new_epoch: bool = False) -> None:
        """Go on from `checkpoint`, bit for bit; all ranks.

        Args:
            new_epoch: with samples in another order, from the next epoch on, if need be.

        Raises:
            CheckpointError: damaged, of another stage or tokenizer, or made by other ranks.
            ConfigError: of another shape, or the samples would come in another order.
        """
        store.verify(checkpoint, self.ranks)
        saved = self.ranks.together(lambda: self._fitting(checkpoint, new_epoch))
        self.engine.load(checkpoint)
        self.engine.load_transform_state(load_tree(self._gradients(checkpoint)))
        self.schedule.load_state_dict(saved["schedule"])
        averages = load_pieces(checkpoint, "ema", self.engine.shard_rank)
        self.ema.load(averages, saved["ema_updates"])
        self.step = saved["step"]

    def _fitting(self, checkpoint: Path, new_epoch: bool) -> dict[str, Any]:
        saved = _read(checkpoint, self.identity.stage)
        self._refuse_other(checkpoint, saved)
        self.progress.load_state_dict(saved.get("data", {}), new_epoch, checkpoint)
        return saved

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """The averaged weights, whole, on the CPU of rank 0; None elsewhere. A collective call."""
        mine = {} if self.engine.node else self.ema.state(self.engine.weights())
        mine = {key: values.cpu() for key, values in mine.items()}
        parts = self.ranks.gather_on_main(mine) if self.engine.zero_stage else [mine]
        if self.ranks.rank != 0:
            return None
        pieces = {key: values for part in parts for key, values in part.items()}
        return assemble(pieces, self.engine.shapes)

    def _write(self, folder: Path) -> None:
        # Two things are collective: a rank whose own files fail must still take part in them.
        transform = self.engine.transform_state()
        error = _failure(lambda: self._write_ours(folder, transform))
        self.engine.save(folder)
        if error is not None:
            raise error

    def _write_ours(self, folder: Path, transform: dict[str, Any]) -> None:
        if self.engine.node > 0:
            return  # the first node's are the same
        weights, shard_rank = self.engine.weights(), self.engine.shard_rank
        save_pieces(folder, "raw", shard_rank, {piece.key: piece.values for piece in weights})
        save_pieces(folder, "ema", shard_rank, self.ema.state(weights))
        if self.engine.zero_stage or self.ranks.rank == 0:
            save_tree(self._gradients(folder), transform)
        if self.ranks.rank == 0:
            (folder / TRAINING).write_text(json.dumps(self._summary(), indent=1))
            (folder / CONFIG).write_text(to_yaml(self.identity.config))

    def _gradients(self, folder: Path) -> Path:
        shard_rank = self.engine.shard_rank if self.engine.zero_stage else 0
        return folder / "gradients" / f"rank-{shard_rank:05d}{SUFFIX}"

    def _summary(self) -> dict[str, Any]:
        return {
            "stage": self.identity.stage,
            "step": self.step,
            "schedule": self.schedule.state_dict(),
            "data": self.progress.state_dict(),
            "ema_updates": self.ema.updates,
            "fingerprints": dict(self.identity.fingerprints),
            "made_by": self._made_by(),
        }

    def _made_by(self) -> dict[str, Any]:
        """Must be the same in a resumed run: DeepSpeed's files depend on it."""
        return {
            # Without ZeRO every rank has everything, and any number of them may go on.
            "ranks": self.engine.shard_world if self.engine.zero_stage else 1,
            "zero_stage": self.engine.zero_stage,
            "precision": self.identity.precision,
            "optimizer": self.engine.optimizer,
            "moments": self.identity.settings.moments,
            "between_nodes": self.identity.between_nodes,
        }

    def _refuse_other(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        lines = difference(saved["fingerprints"], dict(self.identity.fingerprints))
        if lines:
            raise CheckpointError(
                f"{checkpoint}: was trained with another {'; another '.join(lines)}; name the "
                "files it was trained with (paths.tokenizer, image_tokenizer.path), or start a "
                "new run"
            )
        theirs = yaml.safe_load((checkpoint / CONFIG).read_text())
        ours = to_dict(self.identity.config)
        lines = section_differences(theirs, ours, self.identity.sections)
        if lines:
            raise ConfigError(
                f"{checkpoint}: these keys must be as in the checkpoint: {'; '.join(lines)}"
            )
        lines = difference(saved["made_by"], self._made_by())
        if lines:
            raise CheckpointError(
                f"{checkpoint}: DeepSpeed's state was written with other settings: "
                f"{'; '.join(lines)}; start with the same number of ranks (of a node, where ZeRO "
                "stays inside each), ZeRO stage, precision, optimizer and moments"
            )


def _read(checkpoint: Path, kind: str) -> dict[str, Any]:
    saved: dict[str, Any] = read_training(checkpoint)
    if saved["stage"] != kind:
        raise CheckpointError(f"{checkpoint}: is of stage '{saved['stage']}', and this is '{kind}'")
    return saved


def _failure(action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except (OSError, RuntimeError, UserError) as error:
        return error
    return None
