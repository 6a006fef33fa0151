"""A run is a folder: config.yaml, log.jsonl, starts.jsonl, tensorboard/, samples/, checkpoints/,
release/."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import yaml
from PIL import Image
from tqdm import tqdm

from dalle_dist import storage
from dalle_dist.config import Config, section_differences, to_dict, to_yaml
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import ConfigError, UserError
from dalle_dist.stages import IN_VAIN
from dalle_dist.storage.lease import LIFETIME
from dalle_dist.train import starts
from dalle_dist.train.lock import LEASE, LOCK, Lock
from dalle_dist.train.tags import single, tagged
from dalle_dist.watch.heartbeat import NAME as HEARTBEAT

# What may lie in a run's folder before the run does: of others that train there, and of its job.
BEFORE = (LOCK, LEASE, "slurm", IN_VAIN)


class Run:
    """The folder of one training run; only rank 0 writes, and nothing before `open`.

    Making one is for all ranks: it looks at the folder and keeps other processes out of it. `close`
    without `open` leaves the disk as it was. A remote run (`s3://`) is written to a local working
    copy; `sync` uploads what changed. `shape` names the config sections that a resumed run must not
    change; `texts`, by name and in Markdown, go to TensorBoard beside the config. `lease_seconds`:
    as of `Lock`.

    Raises:
        UserError: the folder holds a run and `resume` is false, another process trains in it, or
            its store does not keep two apart.
        ConfigError: resumed with another shape.
    """

    def __init__(
        self,
        path: str,
        config: Config,
        ranks: Ranks,
        *,
        resume: bool,
        shape: tuple[str, ...],
        texts: Mapping[str, str] | None = None,
        wandb: bool = False,
        lease_seconds: float = LIFETIME,
    ) -> None:
        self.path, self.main, self._config = path, ranks.rank == 0, config
        self._ranks = ranks
        self._resume, self._shape, self._use_wandb = resume, shape, wandb
        self._texts = {"config": f"```yaml\n{to_yaml(config)}```"} | dict(texts or {})
        self.folder, self._local = working_copy(path), not storage.is_remote(path)
        self._lease_seconds = lease_seconds
        self._lock: Lock | None = None
        self._log: IO[str] | None = None
        self._wandb: Any = None
        self._bar: tqdm | None = None
        # All have looked before rank 0 makes the lock.
        ranks.together(self._look if self._local else self._look_there)
        try:
            ranks.together(self._keep_others_out)
            if not self._local:
                # Not before: another process of this machine may be training in the working copy.
                download(path, ranks)
                ranks.together(self._look)
        except UserError:
            self.close()
            raise

    @property
    def checkpoints(self) -> str:
        """The folder of checkpoints, remote where the run is."""
        return storage.join(str(self.folder) if self._local else self.path, "checkpoints")

    @property
    def scratch(self) -> Path:
        """Where files of a remote run's checkpoints lie before they are uploaded."""
        return self.folder.with_name(f"{self.folder.name}.checkpoints")

    @property
    def lost(self) -> bool:
        """Whether rank 0, which is asked, knows that another process has taken the run over."""
        return self._lock is not None and self._lock.lost

    def fence(self) -> None:
        """Return when this process alone may write to the run; asked of rank 0.

        Raises CheckpointError: another has taken it over; DataError: the store does not answer.
        """
        if self._lock is not None:
            self._lock.fence()

    def _look_there(self) -> None:
        if self.main and not self._resume:
            _refuse_run(self.path, self.path)

    def _look(self) -> None:
        if self._resume:
            saved = saved_config(self.folder)
            _refuse_other_shape(self.path, saved, to_dict(self._config), self._shape)
        else:
            _refuse_used(self.path, self.folder)

    def _keep_others_out(self) -> None:
        if self.main:
            self._lock = Lock(self.folder, self.path, self.say, self._lease_seconds)
            if self._local:
                self._look()  # once more: another process may have come and gone since

    def open(self, step: int) -> None:
        """Begin to write, when nothing that can be checked is left to fail; after so many steps."""
        if not self.main:
            return
        from torch.utils.tensorboard import SummaryWriter

        if not (self.folder / "config.yaml").exists():
            self._write_config()
        with (self.folder / starts.FILE).open("a") as file:
            file.write(json.dumps(starts.start_record(self._ranks, step)) + "\n")
        self._log = (self.folder / "log.jsonl").open("a", buffering=1)
        self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"))
        for name, text in self._texts.items():
            self._tensorboard.add_text(name, text)
        if self._use_wandb:
            import wandb

            tree = to_dict(self._config)
            self._wandb = wandb.init(
                project="dalle-dist", name=self._config.name, config=tree, dir=self.folder
            )

    def _write_config(self) -> None:
        storage.write_bytes(str(self.folder / "config.yaml"), to_yaml(self._config).encode())

    def rewind(self, step: int) -> None:
        """Accept a resumed run at `step`: later log lines go, the config in force is saved."""
        if not self.main or self._log is None:
            return
        self._write_config()
        self._log.close()
        path = self.folder / "log.jsonl"
        lines = [line for line in path.read_text().splitlines(True) if _step_of(line) <= step]
        storage.write_bytes(str(path), "".join(lines).encode())
        self._log = path.open("a", buffering=1)

    def log(self, step: int, **numbers: float | list[float]) -> None:
        """One line of log.jsonl, and the same numbers to TensorBoard (and W&B if asked for).

        Of a list there is one number per resblock. TensorBoard has the numbers in groups, by
        `tags.py`. NaN, which JSON does not have, is written as null.
        """
        if not self.main or self._log is None:
            return
        finite = {name: _without_nan(number) for name, number in numbers.items()}
        line = {"step": step, "time": round(time.time(), 3), **finite}
        self._log.write(json.dumps(line) + "\n")
        for tag, number in tagged(numbers):
            self._tensorboard.add_scalar(tag, number, step)
        if self._wandb is not None:
            self._wandb.log(dict(single(numbers)), step=step)

    def note(self, step: int, **facts: Any) -> None:
        """One line of log.jsonl alone: what is not numbers."""
        if self.main and self._log is not None:
            line = {"step": step, "time": round(time.time(), 3), **facts}
            self._log.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """Those of the log so far, also those of before a resume; empty but on rank 0."""
        return read_log(self.folder) if self.main else []

    def measured(self, step: int) -> bool:
        """Whether the log has what an evaluation after this step found; on rank 0 alone."""
        others = {"loss", "bad_samples"}
        return any(line["step"] == step and not others & line.keys() for line in self.lines())

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """samples/step-00001000-NAME.png, and the same image to TensorBoard."""
        if not self.main:
            return
        import numpy as np

        path = self.folder / "samples" / f"step-{step:08d}-{name}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        pixels_HWC = np.asarray(image.convert("RGB"))
        self._tensorboard.add_image(name, pixels_HWC, step, dataformats="HWC")

    def progress(self, total: int, start: int) -> tqdm:
        """A bar with rate and ETA on rank 0; on no terminal, a line now and then."""
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not self.main,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            desc=Path(self.path).name,
        )
        return self._bar

    def sync(self) -> None:
        """Upload a remote run's new files; nothing to do for a local one. Raises `fence`'s."""
        if self.main and not self._local and self._log is not None:
            self._tensorboard.flush()
            self.fence()
            storage.publish_folder(self.folder, self.path)

    def say(self, line: str) -> None:
        """One line on standard output, from rank 0."""
        if self.main:
            print(f"{self.path}: {line}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()  # an error has a line of its own then
        if self._log is not None:
            self._tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish()
            with suppress(UserError):  # the error that ends the run is on its way
                self.sync()
            self._log.close()
        if self._lock is not None:
            self._lock.release(used=self._log is not None)


def working_copy(path: str) -> Path:
    """Local folder of a run; that of a remote one is filled by `download`."""
    if not storage.is_remote(path):
        return Path(storage.normal(path))
    return storage.cache_folder() / "runs" / hashlib.sha256(path.encode()).hexdigest()[:16]


def download(path: str, ranks: Ranks) -> None:
    """A remote run to its working copy on each node; all ranks."""
    local = working_copy(path)
    ranks.together(lambda: _download(path, local) if ranks.local_rank == 0 else None)


def read_log(run: str | Path) -> list[dict[str, Any]]:
    """Lines of a run's log.jsonl, local or remote, in order: numbers, and lists by resblock."""
    text = storage.read_bytes(storage.join(str(run), "log.jsonl")).decode()
    return [json.loads(line) for line in text.splitlines()]


def saved_config(folder: Path) -> dict[str, Any]:
    """The config a run was started with, as a nested dict; empty when there is none."""
    path = folder / "config.yaml"
    return yaml.safe_load(path.read_text()) if path.exists() else {}


def _without_nan(value: float | list[float]) -> Any:
    if isinstance(value, list):
        return [_without_nan(number) for number in value]
    return None if math.isnan(value) else value


def _download(path: str, local: Path) -> None:
    local.mkdir(parents=True, exist_ok=True)
    names = storage.file_names(path, storage.list_files(path))
    # Checkpoints lie where they are: each rank reads what it needs of one.
    for name in names:
        if name in (LEASE, HEARTBEAT) or name.startswith("checkpoints/"):
            continue
        target = storage.inside(local, name)
        storage.write_bytes(str(target), storage.read_bytes(storage.join(path, name)))


def _refuse_used(path: str, folder: Path) -> None:
    _refuse_run(path, str(folder))
    if folder.exists() and any(p.name not in BEFORE for p in folder.iterdir()):
        raise UserError(f"{path}: not empty and not a run; choose another folder")


def _refuse_run(path: str, folder: str) -> None:
    if storage.exists(storage.join(folder, "config.yaml")):
        raise UserError(f"{path}: holds a run; go on with --resume auto, or choose another folder")


def _refuse_other_shape(
    path: str, saved: dict[str, Any], wanted: dict[str, Any], shape: tuple[str, ...]
) -> None:
    if not saved:
        return
    lines = section_differences(saved, wanted, shape)
    if lines:
        raise ConfigError(f"{path}: cannot resume with another shape: {'; '.join(lines)}")


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return sys.maxsize  # a line cut short by a crash goes too
