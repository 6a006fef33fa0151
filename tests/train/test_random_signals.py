"""A run that gets signals at random moments: no damaged checkpoint, no ranks at different steps.

Each start of two ranks gets one, to one rank or to both, from before they meet until they have
saved; SIGKILL among them. SIGNALS=500 looks closer.
"""

import json
import os
import random
import re
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import forked_ranks
import pytest
import tiny_run
from noted_samples import note, noted

from dalle_dist.checkpoint import store
from dalle_dist.cli import program
from dalle_dist.errors import HUNG
from dalle_dist.train.run import read_log

SIGNALS = int(os.environ.get("SIGNALS", "50"))
STEPS = 5_000  # more than these starts can do: each is cut off
STOPS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
KINDS = (*STOPS, signal.SIGKILL)


def rank_main(rank, folder, config):
    """`dalle-dist train`, which notes the samples of each of its steps."""
    note(folder / f"{rank}.jsonl")
    sys.argv = ["dalle-dist", "train", config, "--resume", "auto"]
    program()


class Starts:
    """Starts of one run."""

    def __init__(self, folder):
        config = tiny_run.make(
            folder, steps=STEPS, save_every=7, eval_every=STEPS, sample_every=0, prompts=[],
            zero_stage=2,
        )  # fmt: skip
        self.run, self.folder = Path(config.paths.run), folder
        self.checkpoints = str(self.run / "checkpoints")
        self.path = tiny_run.write_config(config, folder / "config.yaml")

    def start(self):
        return forked_ranks.start(2, rank_main, self.folder, self.path)

    def steps(self, rank):
        """(step, its samples) of a rank in the order in which it did them, again or not."""
        return noted(self.folder / f"{rank}.jsonl")

    def sizes(self):
        files = [self.folder / f"{rank}.jsonl" for rank in (0, 1)]
        return [file.stat().st_size if file.exists() else 0 for file in files]

    def said(self):
        return [forked_ranks.said(self.folder, rank) for rank in (0, 1)]


def disturbed(starts, draw):
    """One start that gets one signal; which, and the exit statuses."""
    before, ranks, kind = starts.sizes(), starts.start(), draw.choice(KINDS)
    trains, pause = draw.random() < 0.8, draw.uniform(0, 1.5)
    while trains and starts.sizes() == before and all(rank.is_alive() for rank in ranks):
        time.sleep(0.01)
    time.sleep(pause)
    for rank in draw.choice((ranks, ranks[:1], ranks[1:])):
        os.kill(rank.pid, kind)
    late = await_end(ranks)
    assert not late, f"{kind.name}: no end of {late}: {starts.said()}"
    return kind, [rank.exitcode for rank in ranks]


def await_end(ranks):
    """Numbers of the ranks that do not end by themselves, and are killed.

    As launchers do, those that still wait for one that is dead by now are sent SIGTERM after a
    while: before ranks have met, nobody can tell them.
    """
    for seconds, end in ((30, "terminate"), (60, "kill")):
        deadline = time.monotonic() + seconds
        for rank in ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        late = [number for number, rank in enumerate(ranks) if rank.is_alive()]
        for number in late:
            getattr(ranks[number], end)()
    return late


@pytest.mark.slow
def test_signals_at_random_moments(tmp_path):
    starts, draw, stopped = Starts(tmp_path), random.Random(0), 0
    for number in range(SIGNALS):
        before = [len(starts.steps(rank)) for rank in (0, 1)]
        kind, statuses = disturbed(starts, draw)
        said = starts.said()
        about = f"start {number}, {kind.name}, {statuses}: {said}"
        passed_over = []
        store.newest(starts.checkpoints, say=passed_over.append)
        assert passed_over == [], about
        assert set(statuses) <= {0, HUNG, 130, -kind, -signal.SIGTERM}, about
        assert "Traceback" not in "".join(said), about
        if 0 in statuses:
            stopped += 1
            assert_both_stopped_at_one_step(starts, statuses, before, about)
    assert stopped >= SIGNALS // 3, "most signals but SIGKILL stop a run in good order"
    assert_each_step_had_the_same_samples(starts)
    logged = [line["step"] for line in read_log(starts.run) if "loss" in line]
    assert logged == list(range(1, len(logged) + 1)), "each step once"


def restored_step(starts):
    """0: none is."""
    found = re.search(r"restored step ([\d,]+);", starts.said()[0])
    return int(found.group(1).replace(",", "")) if found else 0


def assert_both_stopped_at_one_step(starts, statuses, before, about):
    """Of a start before which the ranks had noted `before` lines."""
    assert statuses == [0, 0], about
    stopped = int(re.search(r"stopped at step (\d+);", starts.said()[0]).group(1))
    assert store.steps(starts.checkpoints)[-1] == stopped, about
    first, second = (starts.steps(rank)[lines:] for rank, lines in enumerate(before))
    # Whoever is told before the first step stops at the step that was restored.
    expected = first[-1][0] if first else restored_step(starts)
    assert stopped == expected, about
    assert [step for step, _ in first] == [step for step, _ in second], about


def assert_each_step_had_the_same_samples(starts):
    for rank in (0, 1):
        found = defaultdict(set)
        for step, samples in starts.steps(rank):
            found[step].add(json.dumps(samples))
        # A step has two micro-batches, each noted by itself.
        assert all(len(samples) <= 2 for samples in found.values())
