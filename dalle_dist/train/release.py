"""The release folder of a finished run, from its checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.convert import convert
from dalle_dist.checkpoint.names import CONFIG, STAMP


def write_release(run: Path, checkpoint: str) -> str:
    """Write `run`/release from the averages of a checkpoint; returns their fingerprint.

    "" where the release is that of this checkpoint already; one of another is made anew.
    """
    folder = run / "release"
    stamp = folder / STAMP
    source = store.fingerprint(checkpoint)
    if stamp.is_file() and (folder / CONFIG).is_file() and stamp.read_text() == source:
        return ""
    shutil.rmtree(folder, ignore_errors=True)
    digest = convert(checkpoint, str(folder), "ema")
    stamp.write_text(source)
    return digest
