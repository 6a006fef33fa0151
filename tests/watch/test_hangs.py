"""Runs that make no progress any more: who is named, and how all ranks end."""

import json
import re
from pathlib import Path

import hung_run
import pytest
import tiny_run

from dalle_dist.errors import HUNG

SECONDS = 4  # hang_after, of steps that take milliseconds


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A run for three ranks, and the program that breaks it."""
    folder = tmp_path_factory.mktemp("hanging")
    config = tiny_run.make(folder, batch_size=6, prompts=[], zero_stage=2, sample_every=0)
    path = tiny_run.write_config(config, folder / "config.yaml")
    (folder / "faulty.py").write_text(hung_run.PROGRAM)
    return [str(folder / "faulty.py"), "train", path, f"watch.hang_after={SECONDS}"]


def told(said):
    return re.findall("dalle-dist: error: (.*)", said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "others"), [("hang", 1, "0, 2"), ("hang", 0, "1-2"), ("stop", 1, "0, 2"),
                                  ("stop", 0, "1-2")]
)  # fmt: skip
def test_one_message_names_the_rank_that_hangs_and_all_end(faulty, tmp_path, fault, rank, others):
    run = tmp_path / "run"
    arguments = [*faulty, f"paths.run={run}"]
    said, codes = hung_run.start(arguments, 3, FAULT=fault, FAULTY=str(rank))
    (line,) = told(said)
    seconds = int(re.match(r"step 3 has made no progress for (\d+) s: ", line)[1])
    assert SECONDS <= seconds < SECONDS + 10
    if fault == "hang":
        assert re.search(
            rf"rank {rank} \(host \S+\) is in train/loop.py:\d+ _step, not in a coll", line
        )
        assert codes == dict.fromkeys(range(3), HUNG)
    else:
        assert re.search(
            rf"rank {rank} \(host \S+\) does not answer \(dead, stopped, starved or cut off\)", line
        )
        assert codes == {0: HUNG, 1: HUNG, 2: HUNG} | {rank: -9}
    assert re.search(rf"; ranks {others} wait in all_reduce \(engine/\S+:\d+ \w+\)", line)
    (note,) = Path(run, "watch").iterdir()
    assert note.read_text() == f"{line}\n"
    heartbeat = json.loads(Path(run, "heartbeat.json").read_text())
    assert (heartbeat["state"], heartbeat["error"]) == ("failed", line)
    assert heartbeat["step"] == 2


@pytest.mark.slow
def test_an_evaluation_that_takes_longer_is_no_hang(faulty, tmp_path):
    run = tmp_path / "run"
    arguments = [*faulty, f"paths.run={run}", "watch.hang_after=2"]
    said, codes = hung_run.start(arguments, 3, FAULT="long evaluation", FAULTY="0", SECONDS="7")
    assert (codes, told(said)) == ({}, [])
    assert json.loads(Path(run, "heartbeat.json").read_text())["state"] == "complete"


@pytest.mark.slow
def test_an_evaluation_that_never_ends_is_one(faulty, tmp_path):
    run = tmp_path / "run"
    # The start, which takes seconds beside other work, has the same allowance.
    arguments = [*faulty, f"paths.run={run}", "watch.hang_after_others=40"]
    said, codes = hung_run.start(arguments, 3, FAULT="long evaluation", FAULTY="0", SECONDS="1000")
    (line,) = told(said)
    assert re.match(r"evaluation at step 6 has made no progress for \d+ s: ranks 0-2 are in", line)
    assert codes == dict.fromkeys(range(3), HUNG)
