"""A run that is killed and goes on with other numbers of ranks trains on the same samples."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny_run

ROOT = Path(__file__).parents[2]
STEPS = 24  # three epochs of 61 samples and a bit, in batches of 8
SETTINGS = {"zero_stage": 0, "eval_every": STEPS, "prompts": []}


def start(folder, config, world):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.Popen(
        [*command, str(world), "-m", "tests.train.recorded_run", str(folder), config],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )


def steps_of(folder):
    """Samples of each step, over all ranks, sorted."""
    found = defaultdict(list)
    for file in folder.glob("*.jsonl"):
        for line in file.read_text().splitlines(True):
            if line.endswith("\n"):
                step, samples = json.loads(line)
                found[step] += map(tuple, samples)
    return {step: sorted(samples) for step, samples in found.items()}


def run_until(folder, config, world, step):
    """Start, and kill all ranks at once when one of them is in `step`; None: let it end."""
    process = start(folder, config, world)
    while process.poll() is None and (step is None or max(steps_of(folder), default=0) < step):
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    said = process.communicate()[0]
    assert step is not None or process.returncode == 0, said
    return steps_of(folder)


@pytest.mark.slow
@settings(max_examples=2)
@given(first=st.integers(2, 12), second=st.integers(13, 22))
def test_the_samples_are_those_of_a_run_that_was_never_killed(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("killed")
    config = tiny_run.make(folder, steps=STEPS, save_every=2, **SETTINGS)
    path = tiny_run.write_config(config, folder / "config.yaml")
    consumed = {}
    for phase, (world, step) in enumerate(((2, first), (4, second), (1, None))):
        consumed |= run_until(folder / f"phase-{phase}", path, world, step)
    assert sorted(consumed) == list(range(1, STEPS + 1))
    assert all(len(samples) == 8 for samples in consumed.values())
    assert consumed == uninterrupted(tmp_path_factory)


def uninterrupted(tmp_path_factory, known=[]):  # noqa: B006 - made once
    if not known:
        folder = tmp_path_factory.mktemp("whole")
        config = tiny_run.make(folder, steps=STEPS, **SETTINGS)
        path = tiny_run.write_config(config, folder / "config.yaml")
        known.append(run_until(folder / "record", path, 1, None))
    return known[0]
