"""How far a job's work is, so that its script knows whether it goes back into the queue.

Asked of our own storage and config, since a run may lie on S3, and the release of a run that was
asked for more steps is not its end.
"""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace

from dalle_dist import storage
from dalle_dist.checkpoint.names import CONFIG, MANIFEST, STAMP, steps
from dalle_dist.config import Config, load
from dalle_dist.errors import ConfigError
from dalle_dist.stages import IN_VAIN, STOP, stage_of


def progress(options: Namespace) -> str:
    """How far the work of a command line is.

    Returns:
        Of a training: "finished" when the release is of the last step, "stopped" when the file
        `stop` lies in the run folder, else the step of the newest checkpoint, or "none". Of other
        verbs: the number of files that they have written.

    Raises:
        UserError: no such preset, a wrong override, or a storage that does not answer.
    """
    folder, stage = folder_of(options), stage_of(options.verb)
    if stage is None:
        return str(len([name for name in storage.list_files(folder) if name != IN_VAIN]))
    newest = max(steps(storage.join(folder, "checkpoints")), default=None)
    wanted = getattr(_config(options), stage.section).steps
    if newest is not None and newest >= wanted and _released(folder, newest):
        return "finished"
    if storage.exists(storage.join(folder, STOP)):
        return "stopped"
    return "none" if newest is None else str(newest)


def in_vain(options: Namespace) -> int:
    """Count a start that came no further than the one before; how many there were in a row."""
    path, here = storage.join(folder_of(options), IN_VAIN), progress(options)
    before = json.loads(storage.read_bytes(path)) if storage.exists(path) else {}
    count = before["starts"] + 1 if before.get("progress") == here else 1
    storage.write_bytes(path, json.dumps({"progress": here, "starts": count}).encode())
    return int(count)


def folder_of(options: Namespace) -> str:
    """Where a command's work lies. Raises ConfigError: it is not of a kind that jobs do."""
    stage = stage_of(options.verb)
    if stage is not None:
        return str(getattr(_config(options).paths, stage.run))
    if options.verb == "encode":
        return _config(options).paths.tokens
    if getattr(options, "out", None) is None:
        raise ConfigError(f"{options.verb}: nothing that goes on later; train or encode do")
    return str(options.out)


def _config(options: Namespace) -> Config:
    return load(options.preset, options.overrides)


def _released(run: str, step: int) -> bool:
    """Whether the release is whole, and that of this step's checkpoint."""
    stamp = storage.join(run, "release", STAMP)
    if not (storage.exists(storage.join(run, "release", CONFIG)) and storage.exists(stamp)):
        return False
    manifest = storage.read_bytes(storage.join(run, "checkpoints", f"step-{step:08d}", MANIFEST))
    return storage.read_bytes(stamp).decode() == hashlib.sha256(manifest).hexdigest()
