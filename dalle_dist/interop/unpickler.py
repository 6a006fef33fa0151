"""Pickles as data: nothing that a pickle names is imported, and nothing of it is called.

Of the names in a pickle a few stand for functions of this file, which make tensors and plain
containers. Every other one becomes a class without code, whose instances (`Record`) hold the state
that the pickle gives them. A call of such a class ends the reading.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from dalle_dist.errors import CheckpointError

# The elements of a storage, as a tensor of one dimension: of its key, dtype and number of elements.
Storages = Callable[[str, torch.dtype, int], Tensor]

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


class _Uncallable(type):
    """Of the classes of records: the opcodes that call a class come through here."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise CheckpointError(f"calls {cls.module}.{cls.name}, which is refused")  # type: ignore[attr-defined]


class Record(metaclass=_Uncallable):
    """An object of a class that is not known here.

    module, name  of its class
    state         what the pickle sets it to; None: nothing
    items         what the pickle puts into it, where it is a kind of dict or list
    """

    module: str
    name: str
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        if args or kwargs:
            raise CheckpointError(f"makes a {cls.module}.{cls.name} of arguments, which is refused")
        found = super().__new__(cls)
        found.state, found.items = None, []
        return found

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)


@dataclass(frozen=True, slots=True)
class _Made:
    """A function of this file in the place of one that the pickle names.

    An object of its own, so that a pickle which sets attributes of the function finds none.
    """

    make: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __setstate__(self, state: Any) -> None:
        raise CheckpointError("sets attributes of a function, which is refused")


def _ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict(_plain(items, list, tuple))


def _set(items: Any = ()) -> set[Any]:
    return set(_plain(items, list, tuple))


def _device(*parts: Any) -> str:
    return ":".join(str(_plain(part, str, int)) for part in parts)


def _plain(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise CheckpointError(f"has a {type(value).__name__} where plain data belongs")
    return value


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """A view of a storage, whose numbers are looked at first; `rest` says what has no use here."""
    numbers = [offset, *_plain(size, tuple), *_plain(stride, tuple)]
    if not isinstance(storage, Tensor) or len(size) != len(stride):
        raise CheckpointError("has a tensor that is no view of a storage")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise CheckpointError("has a tensor of sizes that are no natural numbers")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > len(storage) or (count and last >= len(storage)):
        raise CheckpointError(f"has a tensor of shape {size} beyond its storage's {len(storage)}")
    return storage.as_strided(size, stride, offset) if count else storage.new_empty(size)


def _parameter(data: Any, *rest: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise CheckpointError("has a parameter that is no tensor")
    return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Made(_ordered),
    ("torch._utils", "_rebuild_tensor_v2"): _Made(_tensor),
    ("torch._utils", "_rebuild_tensor"): _Made(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Made(_parameter),
    ("torch", "device"): _Made(_device),
    ("torch", "Size"): _Made(lambda items=(): tuple(_plain(items, list, tuple))),
    **{(module, "set"): _Made(_set) for module in ("builtins", "__builtin__")},
    **{
        (module, name): dtype
        for name, dtype in STORAGES.items()
        for module in ("torch", "torch.cuda", "torch.storage")
    },
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in (*STORAGES.values(), torch.complex64)
    },
}


class Unpickler(pickle._Unpickler):
    """One pickle of `file`, which is left behind it.

    The unpickler that is written in Python: the one in C lets a few bytes ask for 64 GB.
    """

    def __init__(self, file: IO[bytes], storages: Storages | None = None) -> None:
        super().__init__(file, encoding="utf-8")
        self._storages = storages
        self._classes: dict[tuple[str, str], _Uncallable] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if (module, name) not in self._classes:
            names = {"module": module, "name": name}
            self._classes[module, name] = _Uncallable(name.rpartition(".")[2], (Record,), names)
        return self._classes[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # a class, and its source, of no use here
        if self._storages is None or not isinstance(pid, tuple) or len(pid) not in (5, 6):
            raise CheckpointError("has a persistent id that is no storage")
        kind, dtype, key, _, elements = pid[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or pid[5:] not in ((), (None,)):
            raise CheckpointError("has a persistent id that is no storage")
        if type(key) is not str or type(elements) is not int or elements < 0:
            raise CheckpointError("has a storage of a strange key or size")
        return self._storages(key, dtype, elements)


def module_state(module: Record) -> dict[str, Tensor]:
    """The state dict of a pickled torch module. Raises CheckpointError: it is none."""
    found: dict[str, Tensor] = {}
    _collect(module, "", found, ())
    return found


def _collect(module: Any, prefix: str, found: dict[str, Tensor], above: tuple[int, ...]) -> None:
    if module is None:
        return
    state = module.state if isinstance(module, Record) else None
    if not isinstance(state, dict) or id(module) in above:
        raise CheckpointError(f"{prefix or 'the file'} holds no torch module")
    passing = state.get("_non_persistent_buffers_set") or ()
    for part in ("_parameters", "_buffers"):
        for name, tensor in _named(state, part):
            if isinstance(tensor, Tensor) and name not in passing:
                found[f"{prefix}{name}"] = tensor
    for name, inner in _named(state, "_modules"):
        _collect(inner, f"{prefix}{name}.", found, (*above, id(module)))


def _named(state: dict[Any, Any], part: str) -> list[tuple[str, Any]]:
    return list(_plain(state.get(part, {}), dict, OrderedDict).items())
