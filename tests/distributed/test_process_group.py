import os
import time

import pytest
import torch
import torch.distributed as dist

from dalle_dist.distributed import process_group
from dalle_dist.distributed.launchers import GPU_GRANTS, LaunchInfo, first_host, read_environment
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import ConfigError
from dalle_dist.testing import run_distributed

RENDEZVOUS = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
}
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[07-09],n1",
    "SLURM_NTASKS": "7",
}
STEP_PORT = 12_000 + 77 * 31 + 2 * 7
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, LaunchInfo("single")),
        (RENDEZVOUS | {"LOCAL_SIZE": "4"}, LaunchInfo("deepspeed", 5, 1, 8, 4, "a", 29500)),
        (
            RENDEZVOUS | {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"},
            LaunchInfo("torchrun", 5, 1, 8, 2, "a", 29500),
        ),
        (STEP, LaunchInfo("srun", 6, 0, 7, 1, "gpu07", STEP_PORT, "77.2.")),
        (
            STEP | {"SLURM_RESTART_COUNT": "1"},
            LaunchInfo("srun", 6, 0, 7, 1, "gpu07", STEP_PORT + 1, "77.2.1"),
        ),
        (
            STEP | {"SLURM_NODEID": "1", "MASTER_ADDR": "h", "MASTER_PORT": "5"},
            LaunchInfo("srun", 6, 0, 7, 2, "h", 5, "77.2."),
        ),
        # torchrun inside a job step, mpirun inside a job step, and the batch script itself
        (
            STEP | RENDEZVOUS | {"TORCHELASTIC_RUN_ID": "x"},
            LaunchInfo("torchrun", 5, 1, 8, 8, "a", 29500),
        ),
        (STEP | MPI, LaunchInfo("mpirun", 3, 1, 4, 2)),
        (
            STEP | {"PMI_SIZE": "7", "PMI_RANK": "6"},
            LaunchInfo("srun", 6, 0, 7, 1, "gpu07", STEP_PORT, "77.2."),
        ),
        ({"PMI_SIZE": "4", "PMI_RANK": "2"}, LaunchInfo("mpirun", rank=2, world=4)),
        (BATCH_SCRIPT | {"SLURM_NTASKS": "16"}, LaunchInfo("single")),
        # typed into the shell of srun --pty, and started by srun --pty itself
        (STEP | {"SLURM_PTY_PORT": "1", "SLURM_TASK_PID": "1"}, LaunchInfo("single")),
        (
            STEP | {"SLURM_PTY_PORT": "1", "SLURM_TASK_PID": str(os.getpid())},
            LaunchInfo("srun", 6, 0, 7, 1, "gpu07", STEP_PORT, "77.2."),
        ),
    ],
)
def test_place_is_read_from_each_launchers_environment(environ, expected):
    assert read_environment(environ) == expected


def test_half_an_environment_is_refused_with_the_missing_names():
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT is not"):
        read_environment({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[07-09,12],n3", "gpu07"),
        ("a[3,5-6]-ib[1-2],b", "a3-ib1"),
    ],
)
def test_first_host_of_slurms_list(nodelist, host):
    assert first_host(nodelist) == host


def test_single_process_is_a_group_of_one_and_init_may_be_called_again():
    ranks = process_group.init()
    assert (ranks.rank, ranks.world, ranks.launcher) == (0, 1, "single")
    assert process_group.init() is ranks
    assert ranks.sum([1.5, 2.0]) == [1.5, 2.0]


def _collectives(ranks, offset):
    return (
        ranks.sum([float(ranks.rank + offset), 1.0]),
        ranks.any(ranks.rank == 1),
        ranks.any(False),
        ranks.broadcast({"from": ranks.rank}),
        ranks.gather(ranks.rank),
        torch.get_num_threads(),
    )


def test_collectives_give_every_rank_the_same_answer():
    for answer in run_distributed(_collectives, 2, 10):
        assert answer == ([21.0, 2.0], True, False, {"from": 0}, [0, 1], 1)


def _fail_on_one(ranks):
    if ranks.rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def test_run_distributed_shows_the_failing_ranks_reason_without_waiting_for_its_peers():
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"rank 1:(.|\n)*ValueError: the reason"):
        run_distributed(_fail_on_one, 2)
    assert time.monotonic() - start < 30


class _TwoOfThree(Ranks):
    """Three ranks on this host: two on the same eight cores, one on others; one on another host."""

    def gather(self, value):
        host, cpus = value
        return [value, (host, cpus), (host, {98, 99}), ("elsewhere", cpus)]


@pytest.mark.parametrize(
    ("launcher", "chosen", "expected"),
    [("mpirun", None, 4), ("mpirun", "1", None), ("torchrun", "1", 4), ("torchrun", "3", None)],
)
def test_ranks_share_their_cores_unless_the_user_chose(monkeypatch, launcher, chosen, expected):
    """torchrun sets OMP_NUM_THREADS=1 by itself, so that is not the user's word."""
    if chosen is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    process_group._share_cpus(_TwoOfThree(0, 0, 4, launcher, torch.device("cpu")))
    assert threads == ([] if expected is None else [expected])


@pytest.fixture
def no_gpu(monkeypatch):
    """A node of which torch sees no GPU, and nothing in the environment that promises one."""
    for name in (*GPU_GRANTS, "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(process_group.Path, "exists", lambda path: False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUDA_VISIBLE_DEVICES", "0"),
        ("SLURM_STEP_GPUS", "0,1"),
        ("SLURM_JOB_GPUS", "0"),
        ("SLURM_GPUS_ON_NODE", "2"),
    ],
)
def test_a_gpu_that_was_granted_and_is_not_seen_is_an_error(no_gpu, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}={value}.*DS_ACCELERATOR=cpu") as caught:
        process_group.device_of()
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert process_group.device_of() == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUDA_VISIBLE_DEVICES", ""),
        ("CUDA_VISIBLE_DEVICES", "-1"),
        ("CUDA_VISIBLE_DEVICES", "NoDevFiles"),
        ("SLURM_GPUS_ON_NODE", "0"),
    ],
)
def test_where_no_gpu_was_granted_the_cpu_is_used(no_gpu, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert process_group.device_of() == torch.device("cpu")


def test_a_gpu_of_the_machine_that_torch_does_not_see_is_an_error(no_gpu, monkeypatch):
    monkeypatch.setattr(process_group.Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    with pytest.raises(ConfigError, match=r"a GPU is there \(/dev/nvidia0\)"):
        process_group.device_of()


def test_what_deepspeeds_launcher_sets_by_itself_is_no_grant(no_gpu, monkeypatch):
    """It names as many GPUs as it starts ranks, also where there is none; Slurm's word counts."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for name, value in RENDEZVOUS.items():
        monkeypatch.setenv(name, value)
    assert process_group.device_of() == torch.device("cpu")
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    with pytest.raises(ConfigError, match="SLURM_JOB_GPUS=0"):
        process_group.device_of()
