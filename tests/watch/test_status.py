"""`dalle-dist status` of runs in each state; what a heartbeat holds."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import warnings

import pytest
import tiny_run

from dalle_dist import storage
from dalle_dist.cli import main
from dalle_dist.testing import run_distributed
from dalle_dist.train.optimizer_step import OptimizerSteps
from dalle_dist.train.transformer import train
from dalle_dist.watch.screen import duration, screen
from dalle_dist.watch.status import status, trend

BEAT = {
    "state": "training", "doing": "step", "step": 40, "steps": 100, "ranks": 8, "host": "n7",
    "process": 123, "job": "4711", "restarts": 2, "every": 10.0, "loss": 1.5,
    "saved": {"step": 30, "time": 900.0},
}  # fmt: skip


def write(run, beat=None, lines=(), **files):
    files = {"config.yaml": "name: x\n"} | files
    files["log.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines)
    if beat is not None:
        files["heartbeat.json"] = json.dumps(BEAT | beat)
    for name, text in files.items():
        storage.write_bytes(storage.join(str(run), name), text.encode())
    return str(run)


def line(step, **numbers):
    usual = {"loss": 2 - step / 100, "images_per_s": 12.0, "mfu": 0.4, "seconds_left": 7300}
    return {"step": step, "time": 960.0 + step, **usual, **numbers}


def shown(*arguments):
    """Exit status of `dalle-dist status`, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["status", *arguments])
    return code, out.getvalue()


@pytest.mark.parametrize(
    ("beat", "now", "state"),
    [
        ({"time": 1000.0}, 1059.0, "running"),
        ({"time": 1000.0}, 1061.0, "stalled"),
        ({"time": 1000.0, "every": 60.0}, 1179.0, "running"),
        ({"time": 1000.0, "every": 60.0}, 1181.0, "stalled"),
        ({"time": 1000.0, "state": "complete"}, 9e9, "complete"),
        ({"time": 1000.0, "state": "stopped"}, 9e9, "stopped"),
        ({"time": 1000.0, "state": "failed", "error": "why"}, 9e9, "failed"),
        (None, 1599.0, "running"),
        (None, 1601.0, "stalled"),
    ],
)
def test_the_state_is_that_of_the_heartbeat_unless_it_has_stopped(tmp_path, beat, now, state):
    run = write(tmp_path / "run", beat, [line(40)])
    assert status(run, now).state == state


def test_the_screen_says_what_is_known(tmp_path):
    run = write(
        tmp_path / "run",
        {"time": 1000.0},
        [*(line(step, slowest_rank=3, slowest_ratio=1.9) for step in range(1, 41))],
        **{
            "checkpoints/step-00000020/manifest.json": "{}",
            "checkpoints/step-00000030/manifest.json": "{}",
            "checkpoints/step-00000040.tmp/rank.bin": "",
            "release/config.yaml": "",
        },
    )
    assert screen(status(run, 1005.0), 1005.0).splitlines() == [
        run,
        "  state      running (step), last seen 5 s ago",
        "  step       40 of 100 (40.0%)",
        "  loss       1.6 at step 40, down by 0.1 over the last 10 lines of the log",
        "  speed      12 images/s, MFU 40.0%",
        "  left       2 h 1 min",
        "  saved      step 30, 1 min 45 s ago; checkpoints of 20, 30; release",
        "  slow rank  rank 3 takes 1.9 times as long as the median rank",
        "  process    123 on n7, job 4711, 8 ranks, restarted 2 times",
    ]


def test_what_went_wrong_is_at_the_end(tmp_path):
    beat = {"time": 1000.0, "state": "failed", "error": "step 41 has made no progress"}
    bad = {"step": 7, "time": 5.0, "bad_samples": ["a.tar: k"]}
    run = write(
        tmp_path / "run", beat, [bad, line(40, loss=None)], **{"watch/hang-1.txt": "step 9 hung\n"}
    )
    found = status(run, 1000.0)
    assert found.trouble == [
        "step 7: the loss was not finite; samples: a.tar: k",
        "step 9 hung",
        "step 41 has made no progress",
    ]
    assert "loss       not finite" in screen(found)
    code, text = shown(run, "--json")
    assert code == 1 and json.loads(text)["trouble"] == found.trouble


def test_a_trend_needs_twice_ten_losses():
    assert trend([1.0] * 19) is None
    assert trend([5.0] * 10 + [2.0] * 10) == -3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3600, "1 h"), (90061, "1 d 1 h"), (-5, "0 s")],
)
def test_durations_have_two_parts_at_most(seconds, text):
    assert duration(seconds) == text


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no run (no config.yaml)" in capsys.readouterr().err


def test_follow_ends_with_the_run(tmp_path, monkeypatch):
    run = write(tmp_path / "run", {"time": time.time()}, [line(40)])
    looks = []

    def complete(seconds):
        looks.append(seconds)
        write(tmp_path / "run", {"time": time.time(), "state": "complete"}, [line(100)])

    monkeypatch.setattr("dalle_dist.watch.verbs.time.sleep", complete)
    code, text = shown(run, "--follow", "--json")
    states = [json.loads(one)["state"] for one in text.splitlines()]
    assert (code, states, len(looks)) == (0, ["running", "complete"], 1)


def test_torch_is_not_imported_for_it(tmp_path):
    run = write(tmp_path / "run", {"time": 1000.0, "state": "complete"}, [line(40)])
    program = f"import sys; from dalle_dist.cli import main; main(['status', {run!r}]); "
    program += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def _train(ranks, config, environ, fails_at=0):
    warnings.simplefilter("ignore")
    os.environ.update(environ)
    made = OptimizerSteps.make

    def failing(self, step, *rest):
        if step == fails_at:
            raise RuntimeError("two\nlines")
        return made(self, step, *rest)

    OptimizerSteps.make = failing
    with contextlib.suppress(RuntimeError):
        train(config, "auto")


@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_run_that_failed_and_went_on_tells_of_both(tmp_path, request, where):
    config = tiny_run.make(tmp_path, prompts=[], sample_every=0)
    if where == "remote":
        config = tiny_run.with_paths(config, run=f"{request.getfixturevalue('bucket')}/run")
    run = config.paths.run
    environ = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "DALLE_DIST_"))}
    run_distributed(_train, 2, config, environ, 5)
    found = status(run)
    assert (found.state, found.heartbeat["step"], found.heartbeat["restarts"]) == ("failed", 4, 0)
    assert found.trouble == ["RuntimeError: two lines"]
    assert found.heartbeat["saved"]["step"] == 3 and found.checkpoints == [0, 3]
    run_distributed(_train, 2, config, environ)
    found = status(run)
    assert (found.state, found.heartbeat["step"], found.heartbeat["steps"]) == ("complete", 6, 6)
    assert (found.heartbeat["restarts"], found.heartbeat["ranks"]) == (1, 2)
    assert found.released and found.trouble == []
    assert found.heartbeat["loss"] == found.numbers["loss"]
    assert {"tokens_per_s", "mfu", "seconds_left"} <= found.heartbeat.keys()
    assert shown(run)[0] == 0
