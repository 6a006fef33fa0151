"""How ranks end a run that failed: one reason, one status on all of them, nothing left behind."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import tiny_run
import torch.distributed as dist
from test_train_dvae import write_images

from dalle_dist.distributed import ending, meeting, process_group
from dalle_dist.errors import HUNG, ConfigError, DataError
from dalle_dist.testing import run_distributed

STARTS = int(os.environ.get("STARTS", "5"))
FAULTS = '''"""dalle-dist with one fault, on the rank that FAULTY names."""

import os
import signal

from dalle_dist.cli import program
from dalle_dist.errors import DataError
from dalle_dist.train import loop, transformer

WHERE, ERROR = os.environ["FAULT"].split()
KIND = {"data": DataError, "bug": RuntimeError, "kill": None}[ERROR]


def fail(*_):
    if KIND is None:
        os.kill(os.getpid(), signal.SIGKILL)
    raise KIND("the reason")


if os.environ["RANK"] == os.environ["FAULTY"]:
    if WHERE == "setup":
        transformer.TransformerStage.__init__ = fail
    else:
        step = loop._Loop._step
        loop._Loop._step = lambda self, b: fail() if self.state.step == 1 else step(self, b)
program()
'''


LEAVING = '''"""Ranks whose process group still runs Python in a thread of its own when they end."""

import time

import torch
import torch.distributed as dist

from dalle_dist.distributed import process_group

process_group.init()
work = dist.all_reduce(torch.ones(1), async_op=True)
kept = work.get_future().then(lambda _: time.sleep(1)), dist.group.WORLD
process_group.before_leaving(lambda: print("one last thing"))
process_group.leave(0)
'''


def start(arguments, **environ):
    """Three ranks under torchrun: what they printed, and the exit codes that it reports of them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    command += ["--master-port", str(meeting.free_port()), *arguments]
    environ = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | environ
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    report = re.findall(r"rank +: (\d+).*?\n +exitcode +: (-?\d+)", said)
    return said, {int(rank): int(code) for rank, code in report}


def told(said):
    """The lines that say why; they begin where rank 0's progress bar has stopped."""
    return re.findall("dalle-dist: error: .*", said)


def tracebacks(said):
    """How many, without the one that the launcher ends with."""
    return said.count("Traceback (most recent call last)") - said.count("ChildFailedError:")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(STARTS))
def test_a_batch_that_does_not_divide_is_one_line_and_ends_all_ranks_with_2(tmp_path, number):
    config = tiny_run.make(tmp_path)
    path = tiny_run.write_config(config, tmp_path / "config.yaml")
    said, codes = start(["-m", "dalle_dist", "train", path])
    assert codes == {0: 2, 1: 2, 2: 2}, said
    (line,) = told(said)
    assert "train.batch_size: 8 is not a multiple of train.micro_batch 2 x 3 ranks" in line
    assert "rank 0:" not in line, "all ranks had the same reason"
    assert "terminate called" not in said and tracebacks(said) == 0
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A run that three ranks can do, and the program that breaks it."""
    folder = tmp_path_factory.mktemp("faulty")
    config = tiny_run.make(folder, batch_size=6, prompts=[], zero_stage=2)
    path = tiny_run.write_config(config, folder / "config.yaml")
    (folder / "faults.py").write_text(FAULTS)
    return folder, [str(folder / "faults.py"), "train", path]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("where", ["setup", "step"])
def test_what_a_user_can_mend_on_one_rank_ends_all_with_2_after_one_line(
    faulty, tmp_path, where, rank
):
    run = tmp_path / "run"
    arguments = [*faulty[1], f"paths.run={run}"]
    said, codes = start(arguments, FAULT=f"{where} data", FAULTY=str(rank))
    assert codes == {0: 2, 1: 2, 2: 2}, said
    (line,) = told(said)
    assert line.endswith("the reason")
    assert tracebacks(said) == 0 and "terminate called" not in said
    if where == "setup":
        assert f"rank {rank}: the reason" in line
        assert not run.exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("where", ["setup", "step"])
def test_a_bug_on_one_rank_is_one_traceback_and_ends_the_others_with_2(
    faulty, tmp_path, where, rank
):
    arguments = [*faulty[1], f"paths.run={tmp_path / 'run'}"]
    said, codes = start(arguments, FAULT=f"{where} bug", FAULTY=str(rank))
    assert codes == {0: 2, 1: 2, 2: 2} | {rank: 1}, said
    assert tracebacks(said) == 1, said
    assert "RuntimeError: the reason" in said
    assert told(said) == [] and "terminate called" not in said


def _together(ranks, failing):
    def action():
        if ranks.rank in failing:
            raise (DataError if ranks.rank == 1 else ConfigError)(f"no {ranks.rank}")
        return ranks.rank * 10

    try:
        return ranks.together(action)
    except (ConfigError, DataError) as error:
        return type(error).__name__, str(error)


def _all_togethers(ranks):
    return [_together(ranks, failing) for failing in ((), (1,), (1, 2), (0, 1, 2), ())]


def test_together_gives_each_rank_its_value_or_all_of_them_the_first_reason():
    one = ("DataError", "rank 1: no 1")
    everyone = ("ConfigError", "no 0")  # the same mistake on all ranks is nobody's in particular
    expected = [one, one, everyone]
    found = run_distributed(_all_togethers, 3)
    assert found == [[10 * rank, *expected, 10 * rank] for rank in range(3)]


def _together_with_a_fault(ranks):
    """What each rank gets of a fault on rank 2, while rank 0 has a reason of its own."""

    def action():
        if ranks.rank != 1:
            raise (DataError if ranks.rank == 0 else RuntimeError)(f"no {ranks.rank}")

    found = []
    for call in (ranks.together, lambda action: ranks.on_main(lambda: 1 / ranks.rank)):
        try:
            call(action)
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    return [*found, ranks.on_main(lambda: "still in step")]


def test_a_fault_is_raised_where_it_happened_and_told_to_the_others_at_once():
    of_2 = ("OtherRankError", "rank 2 failed with RuntimeError('no 2')")
    of_0 = ("OtherRankError", "rank 0 failed with ZeroDivisionError('division by zero')")
    assert run_distributed(_together_with_a_fault, 3) == [
        [of_2, ("ZeroDivisionError", "division by zero"), "still in step"],
        [of_2, of_0, "still in step"],
        [("RuntimeError", "no 2"), of_0, "still in step"],
    ]


def _announce(ranks):
    ending = process_group.ending()
    before = ending.told_elsewhere()
    ranks.barrier()
    first = ending.announce(75) if ranks.rank != 1 else None
    ranks.barrier()
    return before, first, ending.told_elsewhere()


def test_one_rank_is_the_first_to_tell_and_those_that_have_not_told_know():
    found = run_distributed(_announce, 3)
    assert [before for before, _, _ in found] == [0, 0, 0]
    assert sorted([found[0][1], found[2][1]]) == [False, True]
    assert [elsewhere for _, _, elsewhere in found] == [0, 75, 0]


def test_a_store_whose_rank_is_gone_is_a_lost_peer():
    """As for ranks that make a group, which send nothing to one another yet."""
    kept = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", kept.port, None, is_master=False, wait_for_workers=False)
    assert client.add("asked", 1) == 1
    del kept
    errors = []
    for _ in range(5):
        with pytest.raises(RuntimeError) as caught:
            client.add("asked", 1)
        errors.append(caught.value)
    assert any("Broken pipe" in str(error) for error in errors)
    assert all(ending.lost_peer(error) for error in errors), errors


def test_a_single_process_has_nobody_to_tell():
    process_group.init()
    assert process_group.ending() is None


@pytest.mark.slow
def test_a_thread_that_needs_python_aborts_no_rank_that_leaves(tmp_path):
    """Interpreter shutdown ends with SIGABRT there."""
    program = tmp_path / "leaving.py"
    program.write_text(LEAVING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(program)],
        capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("one last thing") == 2


def _leaves_after(ranks, seconds):
    """How long this rank waits for the others, the last of which comes after `seconds`."""
    ranks.barrier()
    if ranks.rank == ranks.world - 1:
        time.sleep(seconds)
    start = time.monotonic()
    process_group.ending().wait_for_all()
    os.kill(os.getpid(), signal.SIGTERM)  # as a launcher does to those who have not left yet
    return time.monotonic() - start


def test_ranks_leave_together_and_do_not_heed_the_launcher_any_more():
    waited = run_distributed(_leaves_after, 3, 1.5)
    assert waited[2] < 1 and all(1 < seconds < ending.GRACE for seconds in waited[:2])


@pytest.mark.parametrize(("name", "lost"), [("GRACE", False), ("LOST_GRACE", True)])
def test_a_rank_that_never_comes_is_waited_for_a_while_only(name, lost):
    waited = run_distributed(_goes_without_the_last, 2, name, lost)
    assert 0.3 <= waited[0] < 3


def _goes_without_the_last(ranks, name, lost):
    ranks.barrier()
    if ranks.rank == 1:
        return 0.0
    start = time.monotonic()
    with mock.patch.object(ending, name, 0.3):
        process_group.ending().wait_for_all(lost)
    return time.monotonic() - start


@pytest.mark.parametrize(("status", "lost"), [(0, False), (2, False), (HUNG, True)])
def test_the_wait_is_shorter_where_a_rank_is_gone(monkeypatch, status, lost):
    others = mock.Mock()
    monkeypatch.setattr(process_group, "_joined", True)
    monkeypatch.setattr(process_group, "_ending", others)
    monkeypatch.setattr(process_group, "shutdown", lambda: None)
    monkeypatch.setattr(os, "_exit", mock.Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        process_group.leave(status)
    others.wait_for_all.assert_called_once_with(lost=lost)
    os._exit.assert_called_once_with(status)


@pytest.mark.slow
def test_every_run_that_went_well_ends_with_0(tmp_path):
    """Interpreter shutdown aborted one rank of a run in ten; STARTS=100 looks closer."""
    config = tiny_run.make(tmp_path)
    write_images(Path(config.paths.images))
    stage1 = dataclasses.replace(config.dvae_train, batch_size=4, steps=2, log_every=1)
    for number in range(STARTS):
        paths = dataclasses.replace(config.paths, dvae_run=str(tmp_path / f"run{number}"))
        tree = dataclasses.replace(config, dvae_train=stage1, paths=paths)
        path = tiny_run.write_config(tree, tmp_path / "config.yaml")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += [
            "--master-port",
            str(meeting.free_port()),
            "-m",
            "dalle_dist",
            "train-dvae",
            path,
        ]
        environ = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 2])
def test_a_killed_rank_is_one_line_of_the_others(faulty, tmp_path, killed):
    arguments = [*faulty[1], f"paths.run={tmp_path / 'run'}"]
    said, codes = start(arguments, FAULT="step kill", FAULTY=str(killed))
    assert codes[killed] == -9 and set(codes.values()) <= {-9, -15, 75}, said
    assert tracebacks(said) == 0 and "terminate called" not in said
    assert len(told(said)) <= 2 and all("another rank is gone" in line for line in told(said))
