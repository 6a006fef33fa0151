"""What a stage-2 checkpoint holds besides the weights, and who may go on from it.

step-00001000/deepspeed/       weights, moments and master weights as DeepSpeed keeps them
             /weights/         fp32 fragments, raw and averaged (see checkpoint/weights.py)
             /compression/     what PowerSGD goes on from: the machines' mean error
             /training.json    update, schedule, gradient scales, how it was made
             /config.yaml      the config in force
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.compression import load_compression, save_compression
from dalle_dist.checkpoint.convert import find_checkpoint
from dalle_dist.checkpoint.release import CONFIG
from dalle_dist.checkpoint.weights import load_fragments, save_fragments
from dalle_dist.config import Config, difference, to_dict, to_yaml
from dalle_dist.distributed.engine import Engine
from dalle_dist.distributed.launch import Ranks
from dalle_dist.errors import CheckpointError, ConfigError, UserError
from dalle_dist.optim.ema import EMA
from dalle_dist.optim.schedule import Schedule

TRAINING = "training.json"
SHAPE = ("tokenizer", "dvae", "transformer")  # config sections that a resumed run keeps
# Must be the same: DeepSpeed's files depend on them. `ranks` share the weights between them.
MADE_BY = ("ranks", "zero_stage", "precision", "moments", "between_nodes")


class State:
    """Everything that changes from update to update, written and read as one checkpoint."""

    def __init__(
        self, config: Config, ranks: Ranks, engine: Engine, fingerprints: dict[str, str]
    ) -> None:
        self.config, self.ranks, self.engine = config, ranks, engine
        self.fingerprints = fingerprints  # of "tokenizer" and "dvae"
        self.schedule, self.ema = Schedule(config.train), EMA(config.train.ema)
        self.update = 0  # finished

    def save(self, checkpoints: Path) -> Path:
        """Write a checkpoint; all ranks. Raises CheckpointError on all when one could not."""
        return store.save(checkpoints, self.update, self._write, self.ranks, self.config.train.keep)

    def load(self, checkpoint: Path) -> None:
        """Go on from `checkpoint`, bit for bit; all ranks.

        Raises:
            CheckpointError: damaged, of another tokenizer or dVAE, or made by other ranks.
            ConfigError: of another shape.
        """
        store.verify(checkpoint, self.ranks)
        saved = _read(checkpoint)
        self._refuse_other(checkpoint, saved)
        self.engine.load(checkpoint)
        self.schedule.load_state_dict(saved["schedule"])
        scaling, replicas = self.engine.path.scaling, self.engine.path.replicas
        self.engine.path.skipped = saved.get("skipped", 0)  # older runs did not count
        if scaling is not None:
            scaling.load_state_dict(saved["scales"])
        if replicas is not None:
            replicas.load(load_compression(checkpoint, self.engine.place))
        self.ema.load(load_fragments(checkpoint, "ema", self.engine.place), saved["ema_folds"])
        self.update = saved["update"]

    def _write(self, folder: Path) -> None:
        # Two things are collective: a rank whose own files fail must still take part in them.
        replicas = self.engine.path.replicas
        mean = None if replicas is None else replicas.state()
        error = _failure(lambda: self._write_ours(folder, mean))
        self.engine.save(folder)
        if error is not None:
            raise error

    def _write_ours(self, folder: Path, mean: dict[str, Any] | None) -> None:
        if self.engine.machine > 0:
            return  # the first machine's are the same
        fragments, place = self.engine.fragments(), self.engine.place
        save_fragments(folder, "raw", place, {f.key: f.values for f in fragments})
        save_fragments(folder, "ema", place, self.ema.state(fragments))
        if mean is not None:
            save_compression(folder, place, mean)
        if self.ranks.rank == 0:
            (folder / TRAINING).write_text(json.dumps(self._summary(), indent=1))
            (folder / CONFIG).write_text(to_yaml(self.config))

    def _summary(self) -> dict[str, Any]:
        scaling = self.engine.path.scaling
        return {
            "update": self.update,
            "schedule": self.schedule.state_dict(),
            "skipped": self.engine.path.skipped,
            "scales": scaling.state_dict() if scaling is not None else None,
            "ema_folds": self.ema.folds,
            "fingerprints": self.fingerprints,
            "made_by": self._made_by(),
        }

    def _made_by(self) -> dict[str, Any]:
        train, between = self.config.train, self.config.parallel.between_nodes
        values = (self.engine.places, self.engine.stage, train.precision, train.moments, between)
        return dict(zip(MADE_BY, values, strict=True))

    def _refuse_other(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        lines = difference(saved["fingerprints"], self.fingerprints)
        if lines:
            raise CheckpointError(
                f"{checkpoint}: cannot go on with another {'; another '.join(lines)}; give the "
                "files it was trained with, or start a new run"
            )
        ours, theirs = to_dict(self.config), yaml.safe_load((checkpoint / CONFIG).read_text())
        lines = [line for s in SHAPE for line in difference(theirs[s], ours[s], f"{s}.")]
        if lines:
            raise ConfigError(f"{checkpoint}: cannot go on with another shape: {'; '.join(lines)}")
        lines = difference(saved["made_by"], self._made_by())
        if lines:
            raise CheckpointError(
                f"{checkpoint}: DeepSpeed's state was written otherwise: {'; '.join(lines)}; start "
                "with the same number of ranks (of a machine, where ZeRO stays inside each), ZeRO "
                "stage, precision and moments"
            )


def find(resume: str, checkpoints: Path, ranks: Ranks) -> Path | None:
    """The checkpoint to go on from: the newest whole one for "auto" (None: there is none yet)."""
    if resume == "auto":
        return store.latest(checkpoints, ranks)
    return find_checkpoint(resume)


def _read(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / TRAINING
    if not path.is_file():
        raise CheckpointError(f"{checkpoint}: no checkpoint of a transformer ({TRAINING} missing)")
    saved: dict[str, Any] = json.loads(path.read_text())
    return saved


def _failure(action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except (OSError, RuntimeError, UserError) as error:
        return error
    return None
