"""Programs that stand in for Slurm's, for what a real one cannot be brought to do in a test."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
JOB = {
    "SLURM_TASKS_PER_NODE": "1", "SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "x",
    "SLURMD_NODENAME": "n1",
}  # fmt: skip


class FakeSlurm:
    """`srun` ends with the given statuses, one after another; `python` answers for progress.

    progress  what it says before and after each start
    asked     the command lines of srun and scontrol so far
    """

    def __init__(self, folder, statuses, progress, vain="1"):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        (folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        (folder / "progress").write_text("".join(f"{word}\n" for word in progress))
        log = f'echo "$(basename "$0") $*" >>{folder}/asked\n'
        self._program(
            "srun",
            log + self._next("statuses") + 'case $next in K) exit 137;; *) exit "$next";; esac',
        )
        self._program("scontrol", log + "exit ${REFUSED:-0}")
        in_vain = f'case "$*" in *--in-vain*) echo {vain}; exit;; esac\n'
        self._program("python", in_vain + self._next("progress") + 'echo "$next"')

    def _next(self, name):
        file = self.folder / name
        return f"next=$(head -n 1 {file}); sed -i 1d {file}\n"

    def _program(self, name, body):
        (self.bin / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (self.bin / name).chmod(0o755)

    def run(self, *words, **environ):
        path = f"{self.bin}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", ROOT / "slurm" / "job.sh", *words],
            cwd=self.folder,
            env=os.environ | JOB | {"DALLE_DIST_DOCTOR": "0", "PATH": path} | environ,
            capture_output=True,
            text=True,
        )

    @property
    def asked(self):
        file = self.folder / "asked"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def requeued(self):
        return [line.split()[-1] for line in self.asked if line.startswith("scontrol requeue")]
