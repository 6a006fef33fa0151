"""`progress.py VERB PRESET [key=value ...]` prints how far a run is: finished, none, or a step.

Asked of our own storage and config, since a run may lie on S3, and the release of a run that was
asked for more steps is not its end.
"""

from __future__ import annotations

import hashlib
import re
import sys

from dalle_dist.checkpoint.release import CONFIG, STAMP
from dalle_dist.checkpoint.store import MANIFEST
from dalle_dist.config import load
from dalle_dist.errors import UserError
from dalle_dist.storage import exists, join, list_files, read_bytes


def progress(verb: str, preset: str, *overrides: str) -> str:
    """Step of the newest checkpoint, "none", or "finished" when the release is of the last one.

    Raises UserError: no such preset, a wrong override, or a storage that does not answer.
    """
    config = load(preset, list(overrides))
    first_stage = verb == "train-dvae"
    run = config.paths.dvae_run if first_stage else config.paths.run
    wanted = config.dvae_train.steps if first_stage else config.train.steps
    # Only a whole checkpoint has left its .tmp folder.
    whole = re.compile(rf"step-(\d+)/{re.escape(MANIFEST)}")
    files = (whole.fullmatch(name) for name in list_files(join(run, "checkpoints")))
    newest = max((int(match[1]) for match in files if match), default=None)
    if newest is None:
        return "none"
    return "finished" if newest >= wanted and _released(run, newest) else str(newest)


def _released(run: str, step: int) -> bool:
    """Whether the release is whole, and that of this step's checkpoint."""
    stamp = join(run, "release", STAMP)
    if not (exists(join(run, "release", CONFIG)) and exists(stamp)):
        return False
    manifest = read_bytes(join(run, "checkpoints", f"step-{step:08d}", MANIFEST))
    return read_bytes(stamp).decode() == hashlib.sha256(manifest).hexdigest()


if __name__ == "__main__":
    try:
        print(progress(*sys.argv[1:]))
    except UserError as error:
        sys.exit(f"dalle-dist: error: {error}")
