"""Of several trainers of one run one writes, on S3 and on a folder without locks.

A machine is its cache folder.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dalle_dist.checkpoint import store
from tests import tiny_run

ROOT = Path(__file__).parents[2]
SECONDS = 3.0  # lifetime of a lease


class Trainers:
    def __init__(self, config, locks, folder):
        self.config, self.locks, self.folder, self.started = config, locks, folder, []

    def start(self):
        cache = self.folder / f"machine-{len(self.started)}"
        environ = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DALLE_DIST_CACHE": str(cache)}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.leased_run", self.config, str(SECONDS), self.locks],
            cwd=ROOT,
            env=os.environ | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.started.append(process)
        return process


def read_until(process, words):
    """Its lines, until one has these words."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return lines
    pytest.fail(f"ended without '{words}': {''.join(lines)}")


def refused(process):
    """The one error line of a trainer that ends."""
    (line,) = [line for line in process.communicate()[0].splitlines() if line.startswith("error: ")]
    assert process.returncode == 2
    return line


@pytest.fixture(params=["s3", "folder"])
def trainers(request, tmp_path):
    run = str(tmp_path / "run")
    if request.param == "s3":
        run = f"{request.getfixturevalue('bucket')}/run"
    config = tiny_run.make(tmp_path, steps=100_000, save_every=5, eval_every=100_000, prompts=[])
    config = tiny_run.with_paths(config, run=run)
    path = tiny_run.write_config(config, tmp_path / "config.yaml")
    made = Trainers(path, "none" if request.param == "folder" else "kept", tmp_path)
    made.checkpoints = f"{run}/checkpoints"
    yield made
    for process in made.started:
        process.kill()
        process.wait()
        process.stdout.close()


def saves_on(folder):
    """Return when a checkpoint was made that is not there yet."""
    before = max(store.steps(folder))
    deadline = time.monotonic() + 60
    while max(store.steps(folder)) <= before:
        assert time.monotonic() < deadline, "nothing new was saved"
        time.sleep(0.05)


@pytest.mark.slow
def test_one_trains_another_takes_over_and_the_first_ends(trainers):
    first = trainers.start()
    read_until(first, "a checkpoint takes")
    said = refused(trainers.start())
    assert f"another process is training in this run (process {first.pid} on " in said
    saves_on(trainers.checkpoints)
    first.send_signal(signal.SIGSTOP)
    third = trainers.start()
    lines = read_until(third, "restored step")
    assert any(f"process {first.pid} on " in line and "waiting 3 s" in line for line in lines)
    read_until(third, "training the transformer")
    first.send_signal(signal.SIGCONT)
    said = refused(first)
    assert f"took this run over while this one did not answer (process {third.pid} on " in said
    saves_on(trainers.checkpoints)
    third.kill()
    third.wait()
    read_until(trainers.start(), "restored step")
    assert store.newest(trainers.checkpoints) != ""
