"""What a launcher's environment says of this process; read without torch, which is quick."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dalle_dist.errors import ConfigError

# Set by Slurm, by a launcher or by hand where GPUs are meant to be used.
GPU_GRANTS = ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")
# Below the ports that Linux hands out to whoever asks for any, from 32,768 on.
FIRST_PORT, PORTS = 12_000, 20_000
_LAUNCH = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
_NO_GPU = ("", "-1", "NoDevFiles")


@dataclass(frozen=True)
class LaunchInfo:
    """One process among its peers, as its launcher tells it."""

    launcher: str  # single | deepspeed | torchrun | srun | mpirun
    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1
    address: str = ""  # of rank 0; empty: still to be agreed on (mpirun, single)
    port: int = 0
    token: str = ""  # tells this launch from others on the same ports


def read_environment(environ: Mapping[str, str]) -> LaunchInfo:
    """The launcher's environment variables to a LaunchInfo.

    mpirun is looked for before srun: inside a Slurm allocation its processes see both.
    Raises ConfigError when the variables of `torchrun` or `deepspeed` are incomplete.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_rendezvous(environ)
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return _info(environ, "mpirun", "OMPI_COMM_WORLD_", ("RANK", "LOCAL_RANK", "SIZE"))
    tasks = environ.get("SLURM_STEP_NUM_TASKS")
    if "PMI_SIZE" in environ and environ["PMI_SIZE"] != tasks:
        return LaunchInfo("mpirun", rank=int(environ["PMI_RANK"]), world=int(environ["PMI_SIZE"]))
    # sbatch sets SLURM_PROCID and SLURM_NTASKS for the batch script too; only srun makes a step.
    if tasks is not None and "SLURM_PROCID" in environ and not _in_shell(environ):
        return _from_slurm(environ)
    return LaunchInfo("single")


def gpu_grant(environ: Mapping[str, str]) -> str | None:
    """`NAME=value` of the first variable that promises this process a GPU; None when none does."""
    # DeepSpeed's launcher sets this one for as many GPUs as it starts ranks, whatever is there.
    by_deepspeed = "RANK" in environ and "TORCHELASTIC_RUN_ID" not in environ
    for name in GPU_GRANTS:
        if name == "CUDA_VISIBLE_DEVICES" and by_deepspeed:
            continue
        value = environ.get(name, "")
        counted = name == "SLURM_GPUS_ON_NODE" and value == "0"
        if value not in _NO_GPU and not counted:
            return f"{name}={value}"
    return None


def first_host(nodelist: str) -> str:
    """`gpu[07-09,12],n3` -> `gpu07`: the first host of Slurm's compressed list."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match.group()) if match else nodelist


def _from_rendezvous(environ: Mapping[str, str]) -> LaunchInfo:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environ]
    if missing:
        raise ConfigError(
            f"environment: RANK or WORLD_SIZE is set, but {', '.join(missing)} is not; start with "
            "torchrun, deepspeed, srun or mpirun, or unset them for a single process"
        )
    world = int(environ["WORLD_SIZE"])
    return LaunchInfo(
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed",
        rank=int(environ["RANK"]),
        local_rank=int(environ["LOCAL_RANK"]),
        world=world,
        local_world=int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or world),
        address=environ["MASTER_ADDR"],
        port=int(environ["MASTER_PORT"]),
    )


def _info(
    environ: Mapping[str, str], launcher: str, prefix: str, names: tuple[str, str, str]
) -> LaunchInfo:
    rank, local_rank, world = (int(environ[prefix + name]) for name in names)
    local_world = int(environ.get(f"{prefix}LOCAL_SIZE", 1))
    return LaunchInfo(launcher, rank, local_rank, world, local_world)


def _from_slurm(environ: Mapping[str, str]) -> LaunchInfo:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or "127.0.0.1"
    return LaunchInfo(
        launcher="srun",
        rank=int(environ["SLURM_PROCID"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        world=int(environ["SLURM_STEP_NUM_TASKS"]),
        local_world=_tasks_of_node(environ),
        address=environ.get("MASTER_ADDR") or first_host(nodes),
        port=int(environ.get("MASTER_PORT") or _slurm_port(environ)),
        token=".".join(environ.get(name, "") for name in _LAUNCH),
    )


def ports_of(info: LaunchInfo, environ: Mapping[str, str]) -> list[int]:
    """On which rank 0 may listen, in the order in which they are tried; one if it was given."""
    if info.launcher != "srun" or environ.get("MASTER_PORT"):
        return [info.port]
    return [FIRST_PORT + (info.port - FIRST_PORT + k * 2_503) % PORTS for k in range(8)]


def _in_shell(environ: Mapping[str, str]) -> bool:
    """Whether this process was typed into the shell of `srun --pty`: then it is no task itself."""
    return "SLURM_PTY_PORT" in environ and environ.get("SLURM_TASK_PID") != str(os.getpid())


def _tasks_of_node(environ: Mapping[str, str]) -> int:
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        tasks, _, times = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(times or 1)
    return counts[int(environ.get("SLURM_NODEID", 0))]


def _slurm_port(environ: Mapping[str, str]) -> int:
    """Another one for each job, step and requeue, below the ports that the kernel hands out."""
    job, step, restart = (int(environ.get(name) or 0) for name in _LAUNCH)
    return FIRST_PORT + (job * 31 + step * 7 + restart) % PORTS
