"""A run that gets signals at random moments: no damaged checkpoint, no ranks at different steps.

Each start of two ranks gets one, to one rank or both, from before it trains until it is saved;
SIGKILL among them. SIGNALS=500 looks closer.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import tiny_run

from dalle_dist.checkpoint import store
from dalle_dist.train.run import read_log

ROOT = Path(__file__).parents[2]
SIGNALS = int(os.environ.get("SIGNALS", "50"))
STEPS = 3_000  # more than these starts can do: each is cut off
KINDS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGKILL)


class Starts:
    """Starts of one run, whose ranks note the samples of each of their steps."""

    def __init__(self, folder):
        config = tiny_run.make(
            folder, steps=STEPS, save_every=7, eval_every=STEPS, sample_every=0, prompts=[],
            zero_stage=2,
        )  # fmt: skip
        self.run, self.notes = Path(config.paths.run), folder / "notes"
        self.path = tiny_run.write_config(config, folder / "config.yaml")

    def start(self):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        program = ["-m", "tests.train.recorded_run", str(self.notes), self.path]
        return subprocess.Popen(
            [*command, "--nproc-per-node", "2", *program],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )

    def steps(self, rank):
        """(step, its samples) of a rank in the order in which it did them, again or not."""
        file = self.notes / f"{rank}.jsonl"
        lines = file.read_text().splitlines(True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def last_steps(self):
        return [max((step for step, _ in self.steps(rank)[-1:]), default=0) for rank in (0, 1)]


def ranks_of(launcher):
    """Process numbers of the ranks that the launcher has started."""
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    except OSError:
        return []
    return [pid for pid in map(int, children) if b"recorded_run" in command_of(pid)]


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def send(kind, pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, kind)


def disturbed(starts, draw):
    """One start that gets one signal; what it was, its exit status and what was said."""
    process, kind = starts.start(), draw.choice(KINDS)
    before = starts.last_steps()
    trains, pause = draw.random() < 0.8, draw.uniform(0, 1.5)
    while process.poll() is None and trains and starts.last_steps() == before:
        time.sleep(0.02)
    time.sleep(pause)
    ranks = ranks_of(process.pid)
    send(kind, draw.choice((ranks, ranks[:1], ranks[1:])))
    if not ranks:
        send(kind, [process.pid])
    try:
        said = process.communicate(timeout=90)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{kind.name}: no end in 90 s:\n{process.communicate()[0]}")
    return kind, process.returncode, said


@pytest.mark.slow
def test_signals_at_random_moments(tmp_path):
    starts, draw, stopped = Starts(tmp_path), random.Random(0), 0
    for number in range(SIGNALS):
        kind, status, said = disturbed(starts, draw)
        about = f"start {number}, {kind.name}, status {status}:\n{said}"
        passed_over = []
        store.newest(str(starts.run / "checkpoints"), say=passed_over.append)
        assert passed_over == [], about
        if "stopped at step" in said:
            stopped += 1
            first, second = starts.last_steps()
            assert first == second and f"stopped at step {first};" in said, about
            assert store.steps(str(starts.run / "checkpoints"))[-1] == first, about
            assert "Traceback" not in said, about
    assert stopped >= SIGNALS // 4, "most signals but SIGKILL stop a run in good order"
    assert_each_step_had_the_same_samples(starts)
    logged = [line["step"] for line in read_log(starts.run) if "loss" in line]
    assert logged == list(range(1, len(logged) + 1)), "each step once"


def assert_each_step_had_the_same_samples(starts):
    for rank in (0, 1):
        found = defaultdict(set)
        for step, samples in starts.steps(rank):
            found[step].add(json.dumps(samples))
        # A step has two micro-batches, each noted by itself.
        assert all(len(samples) <= 2 for samples in found.values())
