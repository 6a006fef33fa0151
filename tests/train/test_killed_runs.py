"""A run that is killed and goes on with other numbers of ranks trains on the same samples."""

import time
from collections import defaultdict

import forked_ranks
import pytest
import tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from noted_samples import note, noted

from dalle_dist.config import load
from dalle_dist.distributed import process_group
from dalle_dist.train.transformer import train

STEPS = 24  # three epochs of 61 samples and a bit, in batches of 8
SETTINGS = {"zero_stage": 0, "eval_every": STEPS, "prompts": []}


def main(rank, folder, config):
    note(folder / f"{rank}.jsonl")
    train(load(config, []), "auto")
    process_group.leave(0)


def steps_of(folder):
    """Samples of each step, over all ranks, sorted."""
    found = defaultdict(list)
    for file in folder.glob("*.jsonl"):
        for step, samples in noted(file):
            found[step] += map(tuple, samples)
    return {step: sorted(samples) for step, samples in found.items()}


def run_until(folder, config, world, step):
    """Start, and kill all ranks at once when one of them is in `step`; None: let it end."""
    ranks = forked_ranks.start(world, main, folder, config)
    while ranks[0].is_alive() and (step is None or max(steps_of(folder), default=0) < step):
        time.sleep(0.01)
    if step is not None:
        for rank in ranks:
            rank.kill()
    codes = forked_ranks.exit_codes(ranks)
    assert step is not None or codes == world * [0], forked_ranks.said(folder)
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
