"""Who am I among how many: ranks from any launcher, and the few collectives a program needs.

Single process, `deepspeed`, `torchrun`, `srun` and `mpirun` all end in `init()`: NCCL on GPUs, gloo
on CPUs (also forced by DS_ACCELERATOR=cpu).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from dalle_dist.errors import ConfigError, UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Place:
    """One process among its peers, as its launcher tells it."""

    launcher: str  # single | deepspeed | torchrun | srun | mpirun
    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1
    address: str = ""  # of rank 0; empty: still to be agreed on (mpirun, single)
    port: int = 0


@dataclass(frozen=True)
class Ranks:
    """This process' rank in the initialised process group, and its device."""

    rank: int
    local_rank: int
    world: int
    launcher: str
    device: torch.device

    def barrier(self) -> None:
        dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks, in double precision."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        """Each value's largest over all ranks; NaN is not for this."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer on all."""
        return bool(self.max([float(flag)])[0])

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, on every rank; its UserError is raised on all."""
        value: T | None = None
        failure: UserError | None = None
        if self.rank == 0:
            try:
                value = action()
            except UserError as error:
                failure = error
        failure = self.broadcast(failure)
        if failure is not None:
            raise failure
        return cast(T, self.broadcast(value))

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op)
        return tensor.tolist()


def init() -> Ranks:
    """Join the process group of whichever launcher started this process; again: the same ranks.

    Raises:
        ConfigError: the launcher's environment is incomplete, or mpi4py is missing under mpirun.
    """
    global _ranks
    if _ranks is not None and dist.is_initialized():
        return _ranks
    place = read_environment(os.environ)
    if place.launcher == "mpirun":
        place = _meet_by_mpi(place)
    device = _device(place.local_rank)
    _export(place, device)
    _join(place, device)
    _ranks = Ranks(place.rank, place.local_rank, place.world, place.launcher, device)
    _share_cpus(_ranks)
    return _ranks


def shutdown() -> None:
    """Leave the process group, if there is one."""
    global _ranks
    _ranks = None
    if dist.is_initialized():
        dist.destroy_process_group()


def read_environment(environ: Mapping[str, str]) -> Place:
    """The launcher's environment variables to a Place.

    mpirun is looked for before srun: inside a Slurm allocation its processes see both.
    Raises ConfigError when the variables of `torchrun` or `deepspeed` are incomplete.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_rendezvous(environ)
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return _place(environ, "mpirun", "OMPI_COMM_WORLD_", ("RANK", "LOCAL_RANK", "SIZE"))
    tasks = environ.get("SLURM_STEP_NUM_TASKS")
    if "PMI_SIZE" in environ and environ["PMI_SIZE"] != tasks:
        return Place("mpirun", rank=int(environ["PMI_RANK"]), world=int(environ["PMI_SIZE"]))
    # sbatch sets SLURM_PROCID and SLURM_NTASKS for the batch script too; only srun makes a step.
    if tasks is not None and "SLURM_PROCID" in environ:
        return _from_slurm(environ)
    return Place("single")


def first_host(nodelist: str) -> str:
    """`gpu[07-09,12],n3` -> `gpu07`: the first host of Slurm's compressed list."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match.group()) if match else nodelist


def _from_rendezvous(environ: Mapping[str, str]) -> Place:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environ]
    if missing:
        raise ConfigError(
            f"environment: RANK or WORLD_SIZE is set, but {', '.join(missing)} is not; start with "
            "torchrun, deepspeed, srun or mpirun, or unset them for a single process"
        )
    world = int(environ["WORLD_SIZE"])
    return Place(
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed",
        rank=int(environ["RANK"]),
        local_rank=int(environ["LOCAL_RANK"]),
        world=world,
        local_world=int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or world),
        address=environ["MASTER_ADDR"],
        port=int(environ["MASTER_PORT"]),
    )


def _place(
    environ: Mapping[str, str], launcher: str, prefix: str, names: tuple[str, str, str]
) -> Place:
    rank, local_rank, world = (int(environ[prefix + name]) for name in names)
    local_world = int(environ.get(f"{prefix}LOCAL_SIZE", 1))
    return Place(launcher, rank, local_rank, world, local_world)


def _from_slurm(environ: Mapping[str, str]) -> Place:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or "127.0.0.1"
    return Place(
        launcher="srun",
        rank=int(environ["SLURM_PROCID"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        world=int(environ["SLURM_STEP_NUM_TASKS"]),
        local_world=_tasks_of_node(environ),
        address=environ.get("MASTER_ADDR") or first_host(nodes),
        port=int(environ.get("MASTER_PORT") or _slurm_port(environ)),
    )


def _tasks_of_node(environ: Mapping[str, str]) -> int:
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        tasks, _, times = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(times or 1)
    return counts[int(environ.get("SLURM_NODEID", 0))]


def _slurm_port(environ: Mapping[str, str]) -> int:
    """Another one for each job, step and requeue, below the ports that the kernel hands out."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, restart = (int(environ.get(name) or 0) for name in names)
    return 12_000 + (job * 31 + step * 7 + restart) % 20_000


def _meet_by_mpi(place: Place) -> Place:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(f"mpirun needs mpi4py, which cannot be imported: {error}") from None
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_machine = node.Get_size() == world.Get_size()
    address = "127.0.0.1" if one_machine else socket.getfqdn()
    meeting = (os.environ.get("MASTER_ADDR", address), free_port()) if place.rank == 0 else None
    address, port = world.bcast(meeting, root=0)
    return Place(
        place.launcher, world.Get_rank(), node.Get_rank(), world.Get_size(), node.Get_size(),
        address, port,
    )  # fmt: skip


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _device(local_rank: int) -> torch.device:
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # Under `srun --gpus-per-task=1` every rank sees one GPU, which is number 0 to it.
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _export(place: Place, device: torch.device) -> None:
    """What DeepSpeed reads from the environment, whoever launched us."""
    os.environ["LOCAL_RANK"] = str(place.local_rank)
    os.environ["LOCAL_SIZE"] = str(place.local_world)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


def _join(place: Place, device: torch.device) -> None:
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" else None
    if place.launcher == "single":
        store: Any = dist.HashStore()
        dist.init_process_group(
            backend, store=store, rank=0, world_size=1, timeout=TIMEOUT, device_id=bound
        )
        return
    dist.init_process_group(
        backend,
        init_method=f"tcp://{place.address}:{place.port}",
        rank=place.rank,
        world_size=place.world,
        timeout=TIMEOUT,
        device_id=bound,
    )


def _share_cpus(ranks: Ranks) -> None:
    """Give each rank its part of the cores that it may run on, unless the user has chosen.

    torchrun sets OMP_NUM_THREADS=1 by itself, so a 1 under torchrun is not the user's word.
    """
    if ranks.world == 1 or ranks.device.type != "cpu":
        return
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen and not (ranks.launcher == "torchrun" and chosen == "1"):
        return
    mine = (socket.gethostname(), os.sched_getaffinity(0))
    sharers = [cpus for host, cpus in ranks.gather(mine) if host == mine[0] and cpus & mine[1]]
    torch.set_num_threads(max(1, len(mine[1]) // len(sharers)))


_ranks: Ranks | None = None
