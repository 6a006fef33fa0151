"""A run that is killed in any phase of a save goes on from the last whole checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.release import load_release
from tests import tiny_run

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 6, 2


def start(config, phase, save=0, world=2):
    """The exit status of the launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    program = ["-m", "tests.checkpoint.killed_run", phase, str(save), config]
    done = subprocess.run(
        [*command, str(world), *program],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        start_new_session=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == (0 if phase == "none" else -9), done.stdout + done.stderr
    return done.stdout


def configured(folder):
    config = tiny_run.make(
        folder, steps=STEPS, save_every=EVERY, eval_every=STEPS, zero_stage=2, prompts=[]
    )
    return Path(config.paths.run), tiny_run.write_config(config, folder / "config.yaml")


def losses(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run, config = configured(tmp_path_factory.mktemp("undisturbed"))
    start(config, "none")
    return losses(run), load_release(run / "release").fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("save", [1, 3])
@pytest.mark.parametrize("phase", store.PHASES)
def test_killed_after_each_phase(undisturbed, tmp_path, phase, save):
    """Of the trial save at the start, and of the second in the course (step 4)."""
    run, config = configured(tmp_path)
    start(config, phase, save)
    step = EVERY * (save - 1)
    counts = phase in ("renamed", "latest", "pruned")
    found = store.newest(str(run / "checkpoints"))
    last = step if counts else step - EVERY
    assert found == (f"{run}/checkpoints/step-{last:08d}" if last >= 0 else "")
    said = start(config, "none")
    assert (f"restored step {last};" in said) == (last >= 0)
    assert (losses(run), load_release(run / "release").fingerprint) == undisturbed
    assert store.steps(str(run / "checkpoints")) == [STEPS - EVERY, STEPS]
