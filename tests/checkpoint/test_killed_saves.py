"""A run that is killed in any phase of a save goes on from the last whole checkpoint."""

import json
import os
import signal
from collections import Counter
from pathlib import Path

import forked_ranks
import pytest
import tiny_run

from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.release import load_release
from dalle_dist.config import load
from dalle_dist.distributed import process_group
from dalle_dist.train.transformer import train

STEPS, EVERY = 6, 2


def main(rank, folder, config, phase="none", save=0):
    """A run of stage 2. All ranks get SIGKILL when rank 0 is through `phase` of its `save`-th save,
    counted from 1, the trial save of the start.
    """
    seen = Counter()

    def through(name):
        seen[name] += 1
        if (name, seen[name]) == (phase, save) and rank == 0:
            os.kill(int((folder / "other").read_text()), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        (folder / "other").write_text(str(os.getpid()))
    store.phase = through
    train(load(config, []), "auto")
    process_group.leave(0)


def run_through(folder, config, *killed):
    """What rank 0 says. `killed`: phase and save, or nothing."""
    ranks = forked_ranks.start(2, main, folder / "ranks", config, *killed)
    codes, said = forked_ranks.exit_codes(ranks), forked_ranks.said(folder / "ranks")
    assert codes == 2 * [-9 if killed else 0], said
    return said


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
    run_through(run.parent, config)
    return losses(run), load_release(run / "release").fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("save", [1, 3])
@pytest.mark.parametrize("phase", store.PHASES)
def test_killed_after_each_phase(undisturbed, tmp_path, phase, save):
    """Of the trial save at the start, and of the second in the course (step 4)."""
    run, config = configured(tmp_path)
    run_through(tmp_path, config, phase, save)
    step = EVERY * (save - 1)
    counts = phase in ("renamed", "latest", "pruned")
    found = store.newest(str(run / "checkpoints"))
    last = step if counts else step - EVERY
    assert found == (f"{run}/checkpoints/step-{last:08d}" if last >= 0 else "")
    said = run_through(tmp_path, config)
    assert (f"restored step {last};" in said) == (last >= 0)
    assert (losses(run), load_release(run / "release").fingerprint) == undisturbed
    assert store.steps(str(run / "checkpoints")) == [STEPS - EVERY, STEPS]
