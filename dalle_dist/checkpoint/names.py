"""Names of files, and which checkpoints there are by them; without torch."""

from __future__ import annotations

import re
from pathlib import Path

from dalle_dist import storage

MANIFEST = "manifest.json"  # of a checkpoint
CONFIG = "config.yaml"  # of a release
STAMP = "checkpoint.sha256"  # in a run's own release: of the manifest of its checkpoint
STEP = re.compile(r"step-(\d{8,})")  # the folder of one


def steps(folder: str) -> list[int]:
    """Steps of which `folder` holds a checkpoint with a manifest, in order."""
    if storage.is_remote(folder):
        names = [name for name in storage.list_files(folder) if name.endswith(f"/{MANIFEST}")]
        found = [name.removesuffix(f"/{MANIFEST}") for name in names]
    else:
        found = [path.parent.name for path in Path(storage.normal(folder)).glob(f"*/{MANIFEST}")]
    return sorted(int(match[1]) for name in found if (match := STEP.fullmatch(name)))
