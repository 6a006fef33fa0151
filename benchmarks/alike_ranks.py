"""One process as one of many ranks that all hold and compute the same, with a log of what they say.

torch's fake process group stands for the others: it has any number of ranks and communicates
nothing. Here each collective is noted, and gives what it would if all ranks were like this one.
"""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dalle_dist.distributed.process_group import Ranks

# Those that make the host wait for a device, were the tensor on one.
_WAITS = (
    "item",
    "tolist",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "cpu",
    "nonzero",
    "numpy",
)


@dataclass(frozen=True)
class Said:
    """A collective of this rank.

    kind     its name in torch.distributed
    members  how many ranks take part
    bytes    of the tensor that this rank gives to it, or of what it gets if that is larger
    dtype    of the tensor
    """

    kind: str
    members: int
    bytes: int
    dtype: str


class _Done:
    """A collective that is over when it is launched."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class AlikeRanks:
    """Context manager. `said` is the log, `made` the process groups that were created.

    Args:
        rank: which this process is.
        nodes: of `local_world_size` ranks each.
    """

    def __init__(self, rank: int, nodes: int, local_world_size: int) -> None:
        self.rank, self.world, self.local = rank, nodes * local_world_size, local_world_size
        self.said: list[Said] = []
        self.made = 0
        self._patches: list[Any] = []

    def __enter__(self) -> AlikeRanks:
        dist.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.world)
        replaced = {
            "all_reduce": self._all_reduce,
            "broadcast": self._broadcast,
            "all_gather_into_tensor": self._gather_rows,
            "all_gather_single": self._gather_rows,
            "reduce_scatter_tensor": self._scatter_rows,
            "reduce_scatter_single": self._scatter_rows,
            "all_to_all_single": self._exchange,
            "all_gather_object": self._gather_objects,
            "broadcast_object_list": self._broadcast_objects,
            "barrier": self._barrier,
            "new_group": self._counted(dist.new_group),
        }
        for name, function in replaced.items():
            for module in (dist, dist.distributed_c10d):
                if hasattr(module, name):
                    self._patches.append(mock.patch.object(module, name, function))
        local = {"LOCAL_RANK": str(self.rank % self.local), "LOCAL_SIZE": str(self.local)}
        self._patches.append(mock.patch.dict(os.environ, local | {"DS_ACCELERATOR": "cpu"}))
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for patch in reversed(self._patches):
            patch.stop()
        dist.destroy_process_group()

    @property
    def ranks(self) -> Ranks:
        local = self.rank % self.local
        return Ranks(self.rank, local, self.world, "alike", torch.device("cpu"))

    def since(self, mark: int) -> Counter[Said]:
        """What was said after the first `mark` collectives."""
        return Counter(self.said[mark:])

    def _note(self, kind: str, tensor: Tensor, group: Any) -> int:
        members = dist.get_world_size(group)
        size = tensor.numel() * tensor.element_size()
        self.said.append(Said(kind, members, size, str(tensor.dtype).removeprefix("torch.")))
        return members

    def _all_reduce(
        self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        members = self._note("all_reduce", tensor, group)
        if op == dist.ReduceOp.SUM:
            tensor.mul_(members)
        return _Done() if async_op else None

    def _broadcast(self, tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        group = named.get("group", arguments[1] if len(arguments) > 1 else None)
        self._note("broadcast", tensor, group)
        return _Done() if named.get("async_op") else None

    def _gather_rows(self, *given: Any, **named: Any) -> Any:
        output, input, group, async_op = _two_tensors(given, named)
        members = self._note("all_gather", output, group)
        output.view(members, -1).copy_(input.reshape(1, -1).expand(members, -1))
        return _Done() if async_op else None

    def _scatter_rows(self, *given: Any, **named: Any) -> Any:
        output, input, group, async_op = _two_tensors(given, named)
        members = self._note("reduce_scatter", input, group)
        own = input.view(members, -1)[dist.get_rank(group)].view_as(output)
        torch.mul(own, members, out=output)
        return _Done() if async_op else None

    def _exchange(self, *given: Any, **named: Any) -> Any:
        output, input, group, async_op = _two_tensors(given, named)
        members = self._note("all_to_all", input, group)
        own = input.view(members, -1)[dist.get_rank(group)]
        output.view(members, -1).copy_(own.expand(members, -1))
        return _Done() if async_op else None

    def _gather_objects(self, found: list[Any], value: Any, group: Any = None) -> None:
        self._note("all_gather_object", torch.empty(0), group)
        found[:] = [value] * len(found)

    def _broadcast_objects(self, values: Sequence[Any], *_: Any, **named: Any) -> None:
        self._note("broadcast_object", torch.empty(0), named.get("group"))

    def _barrier(self, *_: Any, **named: Any) -> Any:
        self._note("barrier", torch.empty(0), named.get("group"))
        return _Done() if named.get("async_op") else None

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*arguments: Any, **named: Any) -> Any:
            self.made += 1
            return function(*arguments, **named)

        return counted


def _two_tensors(given: Sequence[Any], named: dict[str, Any]) -> tuple[Tensor, Tensor, Any, bool]:
    """(output, input, group, whether it is asynchronous), by place or by any of their names."""
    tensors = [value for value in given if isinstance(value, Tensor)]
    for place in ("output", "input"):
        tensors += [value for name, value in named.items() if name.startswith(place)
                    and isinstance(value, Tensor)]  # fmt: skip
    output, input = tensors
    groups = [value for value in given if isinstance(value, dist.ProcessGroup)]
    return output, input, named.get("group", *groups[:1]), bool(named.get("async_op"))


class HostWaits(TorchFunctionMode):
    """Counts, by the place in the code, what would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _WAITS and any(isinstance(argument, Tensor) for argument in args):
            self.found[f"{name} in {_caller()}"] += 1
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost place outside of torch and this file, as FILE:FUNCTION."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and not path.endswith("alike_ranks.py"):
            break
        frame = frame.f_back
    package = frame.f_code.co_filename.rpartition("/site-packages/")[2]
    return f"{'/'.join(package.split('/')[-3:])}:{frame.f_code.co_name}"
