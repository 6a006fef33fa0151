"""A Slurm job of a config: planned, written into the run's folder, and submitted."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle_dist import storage
from dalle_dist.errors import ConfigError
from dalle_dist.jobs.scripts import SITE, shipped, whole_script


@dataclass(frozen=True)
class Submission:
    """What is to be submitted.

    script    name of a shipped one, without .sbatch
    words     the command's arguments
    folder    of the work: a copy of the script goes into its slurm/
    settings  of sbatch, by their long names
    chain     jobs, each of which waits for the one before; 1 goes back into the queue by itself
    site      path of a site.sh; empty: slurm/site.sh where there is one, or the shipped one
    """

    script: str
    words: Sequence[str]
    folder: str
    settings: Mapping[str, str]
    chain: int = 1
    site: str = ""

    def text(self) -> str:
        """The whole script. Raises ConfigError: the site's file cannot be read."""
        environment = {"DALLE_DIST_REQUEUE": "0"} if self.chain > 1 else {}
        return whole_script(self.script, self._all(), environment, self._site(), self.words)

    def _all(self) -> dict[str, str]:
        # A singleton waits for the jobs of its name and user that were there before.
        return dict(self.settings) | ({"dependency": "singleton"} if self.chain > 1 else {})

    def submit(self) -> list[str]:
        """Write and submit it; the ids of the jobs.

        Raises:
            ConfigError: there is no sbatch here, or it refuses the job.
            DataError: the folder cannot be written to.
        """
        if shutil.which("sbatch") is None:
            raise ConfigError("there is no sbatch here; --dry-run prints the script")
        text = self.text()
        jobs = [self._sbatch(text) for _ in range(self.chain)]
        stamp = time.strftime("%Y%m%d-%H%M%S")
        kept = storage.join(self.folder, "slurm", f"{stamp}-{jobs[0]}.sbatch")
        storage.write_bytes(kept, text.encode())
        return jobs

    def _sbatch(self, text: str) -> str:
        # Options of the command line, since sbatch's variables win over a script's own lines.
        options = [f"--{key}={value}" for key, value in self._all().items()]
        done = subprocess.run(
            ["sbatch", "--parsable", *options], input=text, capture_output=True, text=True
        )
        if done.returncode:
            raise ConfigError(f"sbatch: {' '.join(done.stderr.split())}")
        return done.stdout.strip().partition(";")[0]

    def _site(self) -> str:
        own = self.site or os.environ.get("DALLE_DIST_SITE", "")
        here = Path("slurm", SITE)
        path = Path(own) if own else here if here.is_file() else shipped() / SITE
        try:
            return path.read_text()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; what a site needs, as bash") from None
