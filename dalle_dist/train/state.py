"""What a checkpoint of any stage holds, and who may go on from it.

Tensors by kind (`checkpoint/save.py` writes them): `weights`, `exp_avg` and `exp_avg_sq` of AdamW,
`average`, PowerSGD's `error` and `q`, and DiLoCo's `outer_momentum`. The rest is in the manifest
(`checkpoint/manifest.py`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dalle_dist import __version__
from dalle_dist.checkpoint.convert import AVERAGE, read_training, release_weights
from dalle_dist.checkpoint.manifest import Manifest, read_manifest
from dalle_dist.checkpoint.read import TensorSource
from dalle_dist.checkpoint.save import Saver
from dalle_dist.config import Config, StageConfig, difference, section_differences, to_dict
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.interface import WEIGHTS, Engine
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.gradients.piece import Piece, ReadPieces, assemble, name_and_start
from dalle_dist.optim.ema import EMA
from dalle_dist.train.data import Progress
from dalle_dist.train.skips import Skips

T = TypeVar("T")


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
        skips: Skips | None = None,
    ) -> None:
        self.progress, self.skips = progress, skips or Skips("", "train", 0)
        self.identity, self.ranks, self.engine = identity, ranks, engine
        self.ema, self.schedule = ema, schedule
        self.step = 0  # finished

    def save(self, saver: Saver) -> None:
        """Begin to write a checkpoint; all ranks.

        Raises CheckpointError on all ranks: the save before came to nothing on one, or the nodes'
        weights differ.
        """
        self.engine.settle()
        self.engine.refuse_diverged()
        numbers, tensors = self.engine.transform_state()
        kinds = self.engine.state() | tensors
        if self.ema.updates:  # until then it is the weights
            kinds[AVERAGE] = self._averages(kinds[WEIGHTS])
        saver.save(self._manifest(numbers), kinds)

    def load(self, checkpoint: str, new_epoch: bool = False) -> str:
        """Go on from a checkpoint that was verified; all ranks. What was restored, in words.

        With the ranks and settings that wrote it, bit for bit; with others, from the same values.

        Args:
            new_epoch: with samples in another order, from the next epoch on, if need be.

        Raises:
            CheckpointError: damaged, or of another stage or tokenizer.
            ConfigError: of another shape, or the samples would come in another order.
        """
        began = time.perf_counter()
        manifest = self.ranks.on_main(lambda: read_manifest(checkpoint))
        saved = self.ranks.together(lambda: self._fitting(checkpoint, manifest, new_epoch))

        source = functools.cache(
            lambda kind: TensorSource.of_checkpoint(checkpoint, manifest, kind)
        )

        def read(kind: str, pieces: Sequence[Piece]) -> bool:
            return source(kind).fill(pieces)

        with self.engine.restoring() as restoring:
            self.ranks.together(lambda: self._fill(checkpoint, restoring.share, read))
            restoring.steps = saved["optimizer_steps"]
        self.ranks.together(lambda: self.engine.load_transform_state(saved["gradients"], read))
        self.schedule.load_state_dict(saved["schedule"])
        self.skips.load_state_dict(saved.get("skips", {"bad_losses": 0}))
        self.ranks.together(lambda: self._load_average(checkpoint, saved["ema_updates"], read))
        self.step = saved["step"]
        return self._restored(manifest, time.perf_counter() - began)

    def start_from(self, release: str) -> str:
        """Take the weights of a release, for a run that starts; all ranks. One line of it.

        Raises CheckpointError: no release there, or one whose weights do not fit the model.
        """
        source = self.ranks.together(lambda: release_weights(release, self.engine.shapes))
        with self.engine.restoring() as restoring:
            pieces = restoring.share[WEIGHTS]
            self.ranks.together(lambda: _in_one_line(release, lambda: source.fill(pieces)))
        return f"starts from the weights of {release}"

    def _fill(
        self, checkpoint: str, pieces: Mapping[str, Sequence[Piece]], read: ReadPieces
    ) -> None:
        for kind, found in pieces.items():
            if not _in_one_line(checkpoint, functools.partial(read, kind, found)):
                raise CheckpointError(f"{checkpoint}: {kind} of some elements are missing")

    def _load_average(self, checkpoint: str, updates: int, read: ReadPieces) -> None:
        pieces = [
            Piece(p.name, p.start, torch.empty(p.values.numel())) for p in self.engine.weights()
        ]
        if updates:
            self._fill(checkpoint, {AVERAGE: pieces}, read)
        self.ema.load({piece.key: piece.values for piece in pieces} if updates else {}, updates)

    def _restored(self, manifest: Manifest, seconds: float) -> str:
        """One line: what of the checkpoint is in force, and what has become of the rest."""
        parts = [f"step {self.step:,}", ", ".join(manifest.kinds), "learning rate schedule"]
        parts.append(f"position {self.progress.samples:,} in the training set")
        changed = difference(manifest.layout, self._layout())
        text = f"{'; '.join(parts)}; {manifest.size / 1e9:.3g} GB in {seconds:.1f} s"
        return f"{text}; translated: {'; '.join(changed)}" if changed else text

    def _fitting(self, checkpoint: str, manifest: Manifest, new_epoch: bool) -> Mapping[str, Any]:
        saved = read_training(checkpoint, manifest)
        if saved["stage"] != self.identity.stage:
            raise CheckpointError(
                f"{checkpoint}: is of stage '{saved['stage']}', and this is '{self.identity.stage}'"
            )
        self._refuse_other(checkpoint, manifest)
        self.progress.load_state_dict(saved.get("data", {}), new_epoch, checkpoint)
        return saved

    def _averages(self, weights: Sequence[Piece]) -> list[Piece]:
        return [Piece(*name_and_start(k), v) for k, v in self.ema.state(weights).items()]

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """The averaged weights, whole, on the CPU of rank 0; None elsewhere. A collective call."""
        averages = self.ema.state(self.engine.weights())
        parts = self.ranks.gather_on_main({key: values.cpu() for key, values in averages.items()})
        if self.ranks.rank != 0:
            return None
        pieces = {key: values for part in parts for key, values in part.items()}
        return assemble(pieces, self.engine.shapes)

    def _manifest(self, numbers: Mapping[str, Any]) -> Manifest:
        training = {
            "stage": self.identity.stage,
            "step": self.step,
            "schedule": self.schedule.state_dict(),
            "data": self.progress.state_dict(),
            "ema_updates": self.ema.updates,
            "skips": self.skips.state_dict(),
            "optimizer_steps": self.engine.optimizer_steps,
            "gradients": numbers,
            "shapes": self.engine.shapes,
            "fingerprints": dict(self.identity.fingerprints),
        }
        versions = {
            "dalle-dist": __version__,
            "torch": torch.__version__,
            "deepspeed": metadata.version("deepspeed"),
        }
        return Manifest(
            self.step, self._layout(), versions, training, to_dict(self.identity.config)
        )

    def _layout(self) -> dict[str, Any]:
        return {
            "ranks": self.ranks.world,
            "nodes": self.engine.nodes,
            "zero_stage": self.engine.zero_stage,
            "precision": self.identity.precision,
            "moments": self.identity.settings.moments,
            "between_nodes": self.identity.between_nodes,
        }

    def _refuse_other(self, checkpoint: str, manifest: Manifest) -> None:
        fingerprints = manifest.training["fingerprints"]
        lines = difference(fingerprints, dict(self.identity.fingerprints))
        if lines:
            raise CheckpointError(
                f"{checkpoint}: was trained with another {'; another '.join(lines)}; name the "
                "files it was trained with (paths.tokenizer, image_tokenizer.path), or start a "
                "new run"
            )
        ours = to_dict(self.identity.config)
        lines = section_differences(manifest.config, ours, self.identity.sections)
        if lines:
            raise ConfigError(
                f"{checkpoint}: these keys must be as in the checkpoint: {'; '.join(lines)}"
            )


def _in_one_line(path: str, action: Callable[[], T]) -> T:
    """Trouble of one rank's machine as an error that all ranks end with."""
    try:
        return action()
    except MemoryError:
        raise CheckpointError(f"{path}: out of memory while it was read") from None
    except (OSError, torch.OutOfMemoryError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be read ({reason})") from None
