"""A run that a scheduler, a node or a process cuts off ends as one that nobody disturbed."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import tiny_run

from dalle_dist import storage
from slurm.cluster import until
from slurm.jobs import Job, await_step, losses

pytestmark = pytest.mark.slow

STEPS = 300


def configured(folder, **train):
    """A run long enough to be cut off, and the path of its config."""
    given = {"steps": STEPS, "save_every": 100, "eval_every": STEPS, "prompts": []}
    config = tiny_run.make(folder, **(given | train))
    return config, tiny_run.write_config(config, folder / "config.yaml")


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    config, path = configured(folder)
    Job(cluster, folder, "train", path).assert_completed()
    return losses(config.paths.run)


def assert_whole(config, job, undisturbed, starts=2):
    """The run's log is that of an undisturbed one, each step in it once."""
    job.assert_completed()
    found = losses(config.paths.run)
    assert [step for step, _ in found] == list(range(1, STEPS + 1)), job.said
    assert found == undisturbed
    lines = (Path(config.paths.run) / "starts.jsonl").read_text().splitlines()
    assert len(lines) == starts
    return [json.loads(line) for line in lines]


def test_usr1_saves_and_requeues(cluster, tmp_path, undisturbed):
    config, path = configured(tmp_path)
    job = Job(cluster, tmp_path, "train", path, "data.workers=2")
    await_step(config.paths.run, 40)
    began = time.monotonic()
    job.signal("USR1")
    until(lambda: f"requeueing job {job.id}" in job.said, 60, "the requeue")
    print(f"from USR1 to the requeue: {time.monotonic() - began:.1f} s")
    first, second = assert_whole(config, job, undisturbed)
    assert "Traceback" not in job.said
    saved = second["step"]
    assert 40 <= saved < STEPS and saved % 100, "saved when it was asked, not when it was due"
    assert first["environment"]["SLURM_JOB_ID"] == job.id
    assert second["environment"]["SLURM_RESTART_COUNT"] == "1"


SLOW = '''"""The command of the arguments, with a pause after each step."""

import sys
import time

from dalle_dist.cli import program
from dalle_dist.train import loop

after = loop._Loop._after_step
loop._Loop._after_step = lambda *arguments: (after(*arguments), time.sleep(0.3))
sys.argv = sys.argv[1:]
program()
'''


def test_a_time_limit_ahead(cluster, tmp_path, undisturbed):
    """Of two minutes: Slurm tells a job's steps of it up to a minute sooner than it is asked to."""
    config, path = configured(tmp_path)
    slow, site = tmp_path / "slow.py", tmp_path / "site.sh"
    slow.write_text(SLOW)
    site.write_text(f"inside=({sys.executable} {slow})\n")
    limit = ("--time=2", "--signal=USR1@20")
    job = Job(cluster, tmp_path, "train", path, options=limit, DALLE_DIST_SITE=str(site))
    _, second = assert_whole(config, job, undisturbed)
    assert job.said.count(f"requeueing job {job.id}") == 1
    assert second["step"] % 100, "saved when Slurm asked for it"


def test_scontrol_requeue_lets_the_ranks_save(cluster, tmp_path, undisturbed):
    config, path = configured(tmp_path)
    job = Job(cluster, tmp_path, "train", path)
    await_step(config.paths.run, 40)
    cluster.run("scontrol", "requeue", job.id)
    _, second = assert_whole(config, job, undisturbed)
    assert second["step"] >= 40


def test_a_killed_rank(cluster, tmp_path, undisturbed):
    """The other ends too, and the job goes back though it came no further than its first save."""
    config, path = configured(tmp_path)
    job = Job(cluster, tmp_path, "train", path)
    await_step(config.paths.run, 20)
    os.kill(rank_process(cluster, job, 1), signal.SIGKILL)
    _, second = assert_whole(config, job, undisturbed)
    assert second["step"] in (0, 100, 200)
    assert "dalle-dist: error: another rank is gone without a word" in job.said
    assert "Traceback" not in job.said


def rank_process(cluster, job, rank):
    """The process of a rank, by its variables."""
    marks = (f"SLURM_JOB_ID={job.id}\0", f"SLURM_PROCID={rank}\0", "SLURM_STEP_ID=0\0")
    for process in cluster.processes():
        environ = "\0" + Path(f"/proc/{process}/environ").read_text()
        command = Path(f"/proc/{process}/cmdline").read_text()
        if all(f"\0{mark}" in environ for mark in marks) and "dalle-dist" in command:
            return process
    raise AssertionError(f"no process of rank {rank}")


def test_a_node_that_is_lost_and_comes_back(cluster, tmp_path, undisturbed):
    config, path = configured(tmp_path)
    job = Job(cluster, tmp_path, "train", path)
    await_step(config.paths.run, 20)
    cluster.lose("n2")
    os.kill(rank_process(cluster, job, 1), signal.SIGKILL)
    until(lambda: cluster.state(job.id) in ("PENDING", "REQUEUED"), 120, "the requeue")
    cluster.bring_back("n2")
    assert_whole(config, job, undisturbed)


def test_an_array_of_one_at_a_time_is_a_chain(cluster, tmp_path, undisturbed):
    config, path = configured(tmp_path)
    options = ("--array=1-3%1",)
    job = Job(cluster, tmp_path, "train", path, options=options, DALLE_DIST_REQUEUE="0")
    await_step(config.paths.run, 40)
    running = cluster.run("squeue", "-h", "-t", "R", "-o", "%A", "-j", job.id).stdout.strip()
    # Its status is not 0 where the task has ended by the time that scancel asks once more.
    cluster.run("scancel", "--signal=USR1", running, check=False)
    assert_whole(config, job, undisturbed)
    assert job.said.count("the next job of the chain goes on") == 1
    assert job.said.count("finished; nothing to do") == 1


def test_the_file_stop_ends_a_run_and_its_job(cluster, tmp_path, undisturbed):
    config, path = configured(tmp_path)
    job = Job(cluster, tmp_path, "train", path)
    await_step(config.paths.run, 20)
    stop = Path(config.paths.run, "stop")
    stop.touch()
    job.assert_completed()
    assert "train: stopped" in job.said and "requeueing" not in job.said
    assert "nothing to do" in Job(cluster, tmp_path / "again", "train", path).waited_for()
    stop.unlink()
    job = Job(cluster, tmp_path / "at last", "train", path)
    assert_whole(config, job, undisturbed)


def test_a_run_whose_input_is_missing_is_not_tried_again(cluster, tmp_path):
    config, path = configured(tmp_path)
    Path(config.paths.tokenizer).unlink()
    job = Job(cluster, tmp_path, "train", path)
    assert job.wait(90) == "FAILED"
    assert "no further than before (none); not requeued" in job.said
    assert not Path(config.paths.run).exists()


def test_all_paths_on_s3_and_no_folder_shared(cluster, bucket, tmp_path, undisturbed):
    local, _ = configured(tmp_path)
    config = tiny_run.with_paths(
        local, **{name: f"{bucket}/{name}" for name in ("tokens", "tokenizer", "dvae_run", "run")}
    )
    for name in ("tokens", "dvae_run"):
        storage.publish_folder(tmp_path / name, f"{bucket}/{name}")
    storage.write_bytes(f"{bucket}/tokenizer", (tmp_path / "tokenizer").read_bytes())
    path = tiny_run.write_config(config, tmp_path / "s3.yaml")
    site = tmp_path / "site.sh"
    each = f"DALLE_DIST_CACHE={tmp_path}/node-$SLURM_NODEID exec"
    site.write_text(f"inside=(bash -c '{each} \"$@\"' --)\n")
    aws = {name: text for name, text in os.environ.items() if name.startswith("AWS_")}
    job = Job(cluster, tmp_path, "train", path, DALLE_DIST_SITE=str(site), **aws)
    until(lambda: storage.exists(f"{bucket}/run/log.jsonl"), 90, "the run's log in the bucket")
    until(lambda: "epoch 2" in job.said, 90, "the second epoch")
    job.signal("USR1")
    job.assert_completed()
    assert job.said.count("requeueing") == 1, job.said
    assert losses(config.paths.run) == undisturbed
    assert storage.exists(f"{bucket}/run/release/config.yaml")
    assert {folder.name for folder in tmp_path.glob("node-*")} == {"node-0", "node-1"}
    assert not (tmp_path / "run").exists()
