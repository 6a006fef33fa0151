"""Who am I among how many: ranks from any launcher, and the few collectives a program needs.

Single process, `deepspeed`, `torchrun`, `srun` and `mpirun` all end in `init()`: NCCL on GPUs, gloo
on CPUs (also forced by DS_ACCELERATOR=cpu).
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.distributed.board import Board
from dalle_dist.distributed.ending import Ending
from dalle_dist.distributed.interfaces import own_addresses
from dalle_dist.distributed.launchers import LaunchInfo, gpu_grant, read_environment
from dalle_dist.distributed.meeting import TIMEOUT, choose_interface, meet, open_store, reachable
from dalle_dist.errors import HUNG, ConfigError, OtherRankError, UserError

T = TypeVar("T")


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

    def each(self, value: float) -> list[float]:
        """Every rank's number, in rank order, on every rank; by one all-reduce."""
        return self.sum([value if rank == self.rank else 0.0 for rank in range(self.world)])

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer on all."""
        return bool(self.max([float(flag)])[0])

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast_tensor(self, values: Tensor) -> None:
        """Rank 0's values in this tensor on every rank, in place; it lies on the rank's device."""
        dist.broadcast(values, src=0)

    def sum_tensor(self, values: Tensor) -> None:
        """Each element summed over all ranks, in place and in its dtype, on the rank's device."""
        dist.all_reduce(values)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def gather_on_main(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on rank 0; empty elsewhere."""
        box: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, box, dst=0)
        return box or []

    def together(self, action: Callable[[], T]) -> T:
        """What `action` returns on this rank, if it returns on all of them.

        Raises the UserError of the first rank that has one, on every rank: so none is left waiting
        in a collective for a rank that has gone. Any other exception is raised where it happened,
        and is an OtherRankError on the other ranks.
        """
        if self.world == 1:
            return action()
        value, failure, shared = self._try(action)
        failures = self.gather(shared)
        if failure is not None and failure is not shared:
            raise failure
        failed = {rank: error for rank, error in enumerate(failures) if error is not None}
        for error in failed.values():
            if isinstance(error, OtherRankError):
                raise error
        if len(failed) == self.world:
            raise failed[0]
        for rank, error in failed.items():
            raise type(error)(f"rank {rank}: {error}")
        return cast(T, value)

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, on every rank; its errors as those of `together`."""
        value, failure, shared = self._try(action) if self.rank == 0 else (None, None, None)
        shared = self.broadcast(shared)
        if failure is not None or shared is not None:
            raise cast(Exception, failure or shared)
        return cast(T, self.broadcast(value))

    def _try(self, action: Callable[[], T]) -> tuple[T | None, Exception | None, UserError | None]:
        """(value, what was raised here, what the other ranks are to raise)."""
        try:
            return action(), None, None
        except UserError as error:
            return None, error, error
        except Exception as error:
            return None, error, OtherRankError(f"rank {self.rank} failed with {error!r}")

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op)
        return tensor.tolist()


def init() -> Ranks:
    """Join the process group of whichever launcher started this process; again: the same ranks.

    Raises:
        ConfigError: the launcher's environment is incomplete, mpi4py is missing under mpirun, or
            a GPU was granted that torch does not see.
    """
    global _ranks, _ending, _joined, _store
    if _ranks is not None and dist.is_initialized():
        return _ranks
    info = read_environment(os.environ)
    info, store = _meet_by_mpi(info) if info.launcher == "mpirun" else (info, meet(info))
    _store = store
    choose_interface(store, info)
    if info.world > 1:
        _joined = True
        _ending = Ending(store, info.world)  # now others can be told if what follows fails
    device = device_of(info.local_rank)
    _export(info, device)
    _join(info, device, store)
    _ranks = Ranks(info.rank, info.local_rank, info.world, info.launcher, device)
    _share_cpus(_ranks)
    return _ranks


def shutdown() -> None:
    """Destroy the process group, if there is one: interpreter shutdown can race its threads."""
    global _ranks, _ending
    _ranks = _ending = None
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process with `status`, and together with the other ranks if that is not 0.

    Once ranks have met, interpreter shutdown is left out: it takes process groups apart (DeepSpeed
    keeps some in its modules) while their threads run, and now and then aborts. A script of one's
    own that several ranks run ends with this too.
    """
    if not _joined:
        sys.exit(status)
    if status == 0:
        shutdown()
    if _ending is not None:
        _ending.wait_for_all(lost=status == HUNG)
    else:
        _finalize_mpi()
    _end_children()
    for action in _last_actions:
        with suppress(Exception):
            action()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def before_leaving(action: Callable[[], None]) -> None:
    """Have `action` called at this process' end, by `leave` or by interpreter shutdown."""
    _last_actions.append(action)
    atexit.register(action)


def abandon(status: int) -> NoReturn:
    """End this process at once, from any thread: its main thread is stuck for good.

    Nothing is flushed: the main thread may hold the lock of a stream.
    """
    with suppress(Exception):
        _end_children()
    os._exit(status)


def _end_children() -> None:
    for child in multiprocessing.active_children():
        child.terminate()


def _finalize_mpi() -> None:
    """Tell mpirun, where it started us, that this process ends as it should."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and not mpi.Is_finalized():
        mpi.Finalize()


def board(topic: str) -> Board:
    """Messages between the ranks, beside their collectives. Raises RuntimeError before `init`."""
    if _store is None:
        raise RuntimeError("ranks have not met")
    return Board(_store, topic)


def ending() -> Ending | None:
    """By which this rank tells the others of a failure; None where there are no others."""
    return _ending


def _meet_by_mpi(info: LaunchInfo) -> tuple[LaunchInfo, Any]:
    """As `meet`; MPI tells where rank 0 listens, on a port that it holds by then."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(f"mpirun needs mpi4py, which cannot be imported: {error}") from None
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    rank, one_node = world.Get_rank(), node.Get_size() == world.Get_size()
    store = open_store([int(os.environ.get("MASTER_PORT", 0))]) if rank == 0 else None
    here = (_names_of_this_node(one_node), store.port) if store is not None else None
    names, port = world.bcast(here, root=0)
    address = names[0] if rank == 0 else reachable(names, port)
    # Open MPI numbers the ranks of a node in an order of its own, and DeepSpeed insists on that.
    local_rank = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", node.Get_rank()))
    info = LaunchInfo(
        info.launcher, rank, local_rank, world.Get_size(), node.Get_size(), address, port
    )
    return info, meet(info, store)


def _names_of_this_node(alone: bool) -> list[str]:
    """By which other nodes may know this one: a hostfile of addresses works without any names."""
    if "MASTER_ADDR" in os.environ:
        return [os.environ["MASTER_ADDR"]]
    return ["127.0.0.1"] if alone else [socket.getfqdn(), *own_addresses()]


def device_of(local_rank: int = 0) -> torch.device:
    """The device of the rank with this number on its node.

    Raises ConfigError: a GPU was granted, and torch does not see one.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        _refuse_unseen_gpu()
        return torch.device("cpu")
    # Under `srun --gpus-per-task=1` every rank sees one GPU, which is number 0 to it.
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _refuse_unseen_gpu() -> None:
    """A run that was given a GPU and trains on the CPU wastes the night."""
    grant = gpu_grant(os.environ) or ("/dev/nvidia0" if Path("/dev/nvidia0").exists() else None)
    if grant is None:
        return
    why = "is built for CPUs" if torch.version.cuda is None else "finds no driver that it can use"
    raise ConfigError(
        f"a GPU is there ({grant}), but torch {torch.__version__} {why}; install a torch for CUDA "
        "(pip install torch, see README), or set DS_ACCELERATOR=cpu to use the CPU"
    )


def _export(info: LaunchInfo, device: torch.device) -> None:
    """What DeepSpeed reads from the environment, whoever launched us."""
    os.environ["LOCAL_RANK"] = str(info.local_rank)
    os.environ["LOCAL_SIZE"] = str(info.local_world)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


def _join(info: LaunchInfo, device: torch.device, store: Any) -> None:
    if dist.is_initialized():
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("ranks", store),
        rank=info.rank,
        world_size=info.world,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
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
_ending: Ending | None = None
_store: Any = None
_last_actions: list[Callable[[], None]] = []
_joined = False  # whether this process has ever been one of several ranks
