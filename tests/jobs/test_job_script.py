"""When `slurm/job.sh` puts its job back into the queue, and when it does not."""

import pytest
from jobs.fake_slurm import FakeSlurm


def commands(slurm):
    return [line.partition(" dalle-dist ")[2] for line in slurm.asked if line.startswith("srun")]


def test_a_run_that_came_further_is_requeued_whatever_its_status(tmp_path):
    slurm = FakeSlurm(tmp_path, ["K"], ["100", "200"])
    done = slurm.run("train", "emoji")
    assert (done.returncode, slurm.requeued) == (0, ["1234"]), done.stderr
    assert commands(slurm) == ["train emoji --resume auto"]


def test_a_task_of_an_array_requeues_itself_alone(tmp_path):
    slurm = FakeSlurm(tmp_path, [0], ["100", "200"])
    slurm.run("train", "emoji", SLURM_ARRAY_JOB_ID="1230", SLURM_ARRAY_TASK_ID="7")
    assert slurm.requeued == ["1230_7"]


@pytest.mark.parametrize("word", ["finished", "stopped"])
def test_nothing_is_started_for_a_run_that_is_at_its_end(tmp_path, word):
    slurm = FakeSlurm(tmp_path, [], [word])
    done = slurm.run("train", "emoji")
    assert (done.returncode, slurm.asked) == (0, [])
    assert f"train: {word}" in done.stdout


@pytest.mark.parametrize(("status", "word"), [(0, "finished"), (0, "stopped"), (1, "finished")])
def test_an_end_has_the_status_of_the_run(tmp_path, status, word):
    slurm = FakeSlurm(tmp_path, [status], ["100", word])
    assert slurm.run("train", "emoji").returncode == status
    assert slurm.requeued == []


@pytest.mark.parametrize(("vain", "requeued"), [("1", 1), ("2", 1), ("3", 0), ("4", 0)])
def test_starts_that_come_no_further_end_after_three(tmp_path, vain, requeued):
    slurm = FakeSlurm(tmp_path, ["K"], ["100", "100"], vain)
    done = slurm.run("train", "emoji")
    assert len(slurm.requeued) == requeued
    assert done.returncode == (0 if requeued else 137)


def test_the_number_of_tries_can_be_set(tmp_path):
    slurm = FakeSlurm(tmp_path, ["K"], ["none", "none"], "3")
    slurm.run("train", "emoji", DALLE_DIST_TRIES="4")
    assert slurm.requeued == ["1234"]


def test_what_a_user_must_mend_is_not_tried_again(tmp_path):
    slurm = FakeSlurm(tmp_path, [2], ["none", "none"])
    done = slurm.run("train", "emoji")
    assert (done.returncode, slurm.requeued) == (2, [])
    assert "no further than before (none); not requeued" in done.stderr


def test_a_node_that_the_doctor_finds_ill_ends_before_training(tmp_path):
    slurm = FakeSlurm(tmp_path, [1], ["100", "100"])
    slurm.run("train", "emoji", "train.steps=9", "--new-epoch", DALLE_DIST_DOCTOR="full")
    assert commands(slurm) == ["doctor --for train emoji train.steps=9"]
    assert slurm.requeued == ["1234"]  # other nodes may be well


def test_a_chain_leaves_the_rest_to_its_next_job(tmp_path):
    slurm = FakeSlurm(tmp_path, [0], ["100", "200"])
    done = slurm.run("train", "emoji", DALLE_DIST_REQUEUE="0")
    assert (done.returncode, slurm.requeued) == (0, [])
    assert "the next job of the chain goes on" in done.stdout


def test_a_site_that_forbids_requeueing_is_told_of_chains(tmp_path):
    slurm = FakeSlurm(tmp_path, [0], ["100", "200"])
    done = slurm.run("train", "emoji", REFUSED="1")
    assert done.returncode == 1 and "submit --chain N" in done.stderr


def test_tasks_of_an_array_share_the_shards(tmp_path):
    slurm = FakeSlurm(tmp_path, [0], ["0", "3"])
    array = {"JOB_ID": "9", "TASK_ID": "12", "TASK_MIN": "10", "TASK_COUNT": "4"}
    environ = {f"SLURM_ARRAY_{name}": value for name, value in array.items()}
    done = slurm.run("encode", "emoji", **environ)
    assert commands(slurm) == ["encode emoji --shard 3/4"]
    assert done.returncode == 0 and slurm.requeued == []


def test_what_was_cut_off_with_files_written_goes_on(tmp_path):
    slurm = FakeSlurm(tmp_path, [138], ["0", "3"])
    slurm.run("generate", "release", "a cat")
    assert slurm.requeued == ["1234"]


def test_fewer_tasks_than_gpus_are_refused(tmp_path):
    slurm = FakeSlurm(tmp_path, [], ["100"])
    done = slurm.run("train", "emoji", SLURM_GPUS_ON_NODE="8", SLURM_TASKS_PER_NODE="1(x2)")
    assert (done.returncode, slurm.asked) == (2, [])
    assert "1 tasks for 8 GPUs on a node; add --ntasks-per-node 8" in done.stderr


def test_a_sites_hook_is_read_first(tmp_path):
    slurm = FakeSlurm(tmp_path, [0], ["100", "finished"])
    site = tmp_path / "hook"
    site.write_text("inside=(apptainer exec --nv 'a b.sif')\ntask_options=(--mpi=none)\n")
    done = slurm.run("train", "emoji", DALLE_DIST_SITE=str(site))
    assert done.returncode == 0, done.stderr
    (started,) = [line for line in slurm.asked if line.startswith("srun")]
    assert "--mpi=none apptainer exec --nv a b.sif dalle-dist train emoji" in started
