"""What each start of a run was: code, command, machine and environment, a line of starts.jsonl."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dalle_dist import __version__
from dalle_dist.distributed.process_group import Ranks

FILE = "starts.jsonl"
DIFF = 200_000  # characters of uncommitted changes that are kept
# Variables that decide how a run behaves; anything may stand in others, and in these no secret.
_KEPT = re.compile(
    r"(CUDA|DALLE_DIST|DS|FI|GLOO|LOCAL|MASTER|MKL|NCCL|OMP|OMPI_COMM_WORLD|PMI|PYTORCH|SLURM"
    r"|TORCH|TORCHELASTIC|TRITON|UCX)_.*|RANK|WORLD_SIZE|PYTHONPATH|LD_LIBRARY_PATH"
)
_SECRET = re.compile("JWT|KEY|PASS|SECRET|TOKEN")


def start_record(ranks: Ranks, step: int) -> dict[str, Any]:
    """Of this process; `step` is the one that the run goes on from."""
    return {
        "time": round(time.time(), 3),
        "step": step,
        "ranks": ranks.world,
        "launcher": ranks.launcher,
        "device": ranks.device.type,
        "host": os.uname().nodename,
        "command": shlex.join(sys.argv),
        "folder": str(Path.cwd()),
        "code": code_state(),
        "packages": dict(sorted(_packages())),
        "environment": kept_environment(os.environ),
    }


def code_state() -> dict[str, str]:
    """Version, and of a git checkout the revision and what is changed in it."""
    found = {"version": __version__}
    root = Path(__file__).resolve().parents[2]
    revision = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else ""
    if revision:
        found |= {"revision": revision, "changes": _git(root, "diff", "HEAD")[:DIFF]}
    return found


def kept_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that a run depends on, without those that may hold a secret."""
    kept = {k: v for k, v in environ.items() if _KEPT.fullmatch(k) and not _SECRET.search(k)}
    return dict(sorted(kept.items()))


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _packages() -> list[tuple[str, str]]:
    return [(name, d.version) for d in metadata.distributions() if (name := d.metadata["Name"])]
