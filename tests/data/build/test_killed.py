"""A build that is killed goes on when it is started again, and ends as if nothing had been."""

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from made import build, captions, files, fill
from PIL import Image

from dalle_dist.cli import main
from dalle_dist.data import pool
from dalle_dist.data.build import samples as samples_module

KILLS = 4
COUNT = 240


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    rng = random.Random(0)
    for i in range(COUNT):
        Image.frombytes("RGB", (90, 90), rng.randbytes(90 * 90 * 3)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"noise {i}")
    (root / "bad.png").write_bytes(b"bad")
    (root / "bad.txt").write_text("bad")
    return root


def started(source, out):
    command = [sys.executable, "-m", "dalle_dist", "data", "build", str(source), str(out)]
    command += ["--size", "60", "--samples-per-shard", "2", "--processes", "2"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True
    )


def ended(process):
    """Wait until the process has gone: its output ends when its workers have gone too."""
    text, errors = process.communicate(timeout=120)
    return process.returncode, text, errors


def records(out):
    return len(list(out.glob("unfinished/[!.]*-*.json")))


def kill_after(process, out, more):
    """Kill it once it has finished `more` units more, or has ended; how many are finished."""
    wanted = records(out) + more
    while records(out) < wanted and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    ended(process)
    return records(out)


def test_killed_at_random_points_it_ends_with_the_same_bytes(source, tmp_path):
    status, text, errors = ended(started(source, tmp_path / "undisturbed"))
    assert status == 0, errors
    assert "skipped bad.png: not a picture" in text
    rng, finished = random.Random(1), [0]
    for _ in range(KILLS):
        process = started(source, tmp_path / "out")
        finished.append(kill_after(process, tmp_path / "out", rng.randint(1, 3)))
    assert finished == sorted(finished) and 0 < finished[1] < finished[-1] < COUNT // 2
    assert not (tmp_path / "out/train/index.json").exists()
    status, _, errors = ended(started(source, tmp_path / "out"))
    assert status == 0, errors
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.startswith(".")]


def test_ctrl_c_keeps_what_is_finished_and_says_so(source, tmp_path):
    process = started(source, tmp_path / "out")
    while not records(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    status, _, errors = ended(process)
    assert status == 130 and "the same command goes on" in errors and "Traceback" not in errors
    assert records(tmp_path / "out")


def test_a_killed_worker_is_one_line(tmp_path, image, monkeypatch, capsys):
    def killed(candidate, recipe):
        os.kill(os.getpid(), signal.SIGKILL)

    root = fill(tmp_path / "in", image)
    command = ["data", "build", str(root), str(tmp_path / "out"), "--processes", "2"]
    assert main([*command[:4], "--shard", "1/2", "--processes", "1"]) == 0  # leaves its records
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(samples_module, "try_sample", killed)
    command[3] = str(tmp_path / "other")
    assert main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "killed from outside" in line and "--processes" in line


def test_a_fault_of_the_program_names_the_file(tmp_path, image, monkeypatch, capsys):
    def broken(data):
        raise RuntimeError("no such thing")

    root = fill(tmp_path / "in", image)
    monkeypatch.setattr(samples_module, "read_picture", broken)
    assert build(root, tmp_path / "out") == 2
    assert "n" in (line := capsys.readouterr().err.splitlines()[-1])
    assert ".png: RuntimeError: no such thing" in line


@pytest.mark.parametrize("other", [["--seed", "1"], ["--size", "4"], ["--min-words", "2"]])
def test_another_plan_is_refused(tmp_path, image, capsys, other):
    root = fill(tmp_path / "in", image, 20)
    assert build(root, tmp_path / "out", "--shard", "1/2") == 0
    assert build(root, tmp_path / "out", "--shard", "2/2", *other) == 2
    assert "unfinished command with other inputs or options" in capsys.readouterr().err
    (root / "n0.png").unlink()
    assert build(root, tmp_path / "out", "--shard", "2/2") == 2


def test_parts_by_several_processes_make_the_whole(tmp_path, image, capsys):
    root = fill(tmp_path / "in", image, 20)
    few = ["--samples-per-shard", "3"]
    assert build(root, tmp_path / "whole", *few) == 0
    with ThreadPoolExecutor(3) as threads:
        parts = [f"{i}/3" for i in (1, 2, 3)]
        made = list(threads.map(lambda i: build(root, tmp_path / "out", *few, "--shard", i), parts))
    assert made == [0, 0, 0]
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert len(captions(tmp_path / "out")) == 20
    for wrong in ("0/2", "3/2", "1", "a/b"):
        assert build(root, tmp_path / "out", "--shard", wrong) == 2
        assert "write I/N" in capsys.readouterr().err


def test_killed_while_it_removed_its_records_it_only_ends(tmp_path, image, monkeypatch, capsys):
    def killed(job):
        raise KeyboardInterrupt

    root = fill(tmp_path / "in", image)
    with monkeypatch.context() as patch:
        patch.setattr("dalle_dist.data.shard_job.Job._clean", killed)
        assert build(root, tmp_path / "out") == 130
    next((tmp_path / "out/unfinished").glob("train-*")).unlink()
    monkeypatch.setattr(pool, "make_units", None)
    assert build(root, tmp_path / "out") == 0
    assert "images to train on, " in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "held-out",
        "skipped.jsonl",
        "train",
    ]
