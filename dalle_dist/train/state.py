"""What a stage-2 checkpoint holds besides the weights, and who may go on from it.

step-00001000/deepspeed/       weights, moments and master weights as DeepSpeed keeps them
             /weights/         fp32 fragments, raw and averaged (see checkpoint/weights.py)
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
# Must be the same: DeepSpeed's files depend on them.
MADE_BY = ("ranks", "zero_stage", "precision", "moments")


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
        if self.engine.scaling is not None:
            self.engine.scaling.load_state_dict(saved["scales"])
        self.ema.load(load_fragments(checkpoint, "ema", self.ranks.rank), saved["ema_folds"])
        self.update = saved["update"]

    def _write(self, folder: Path) -> None:
        # DeepSpeed's saving is collective: a rank whose own files fail must still take part.
        error = _failure(lambda: self._write_ours(folder))
        self.engine.save(folder)
        if error is not None:
            raise error

    def _write_ours(self, folder: Path) -> None:
        fragments = self.engine.fragments()
        rank = self.ranks.rank
        save_fragments(folder, "raw", rank, {f.key: f.values for f in fragments})
        save_fragments(folder, "ema", rank, self.ema.state(fragments))
        if rank == 0:
            (folder / TRAINING).write_text(json.dumps(self._summary(), indent=1))
            (folder / CONFIG).write_text(to_yaml(self.config))

    def _summary(self) -> dict[str, Any]:
        return {
            "update": self.update,
            "schedule": self.schedule.state_dict(),
            "scales": self.engine.scaling.state_dict() if self.engine.scaling else None,
            "ema_folds": self.ema.folds,
            "fingerprints": self.fingerprints,
            "made_by": self._made_by(),
        }

    def _made_by(self) -> dict[str, Any]:
        train = self.config.train
        values = (self.ranks.world, self.engine.stage, train.precision, train.moments)
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
                "with the same number of ranks, ZeRO stage, precision and moments"
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
