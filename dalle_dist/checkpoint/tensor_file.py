"""Safetensors files written tensor by tensor, hashed on the way; equal content gives equal bytes.

The library's own writer holds all tensors in memory at once and orders its notes at random.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
import xxhash
from torch import Tensor

from dalle_dist.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes, that of the safetensors library
_CHUNK = 1 << 19  # bytes: what was read is hashed while it is in a core's cache
_READ = 1 << 26  # bytes


@dataclass(frozen=True)
class Slot:
    """What a file holds under one name, and between which of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Written:
    """What a manifest says of a file: its size, and the XXH3-128 of its bytes in hex."""

    bytes: int
    xxh3: str


class TensorFile:
    """A file that is being written; a context manager that leaves it flushed to disk.

    Args:
        shapes: dtype and shape of each tensor; they come in the order of their names.
        notes: strings for the header, which readers get by `read_header`.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self._names = path, iter(sorted(shapes))
        self._shapes, self._digest, self._size = shapes, xxhash.xxh3_128(), 0
        self._name, self._left = "", 0  # of the tensor that is being written, in elements
        self._file = path.open("wb")
        self._write(_header(shapes, notes or {}))

    def begin(self, name: str) -> None:
        """The next tensor, whose elements `add` takes.

        Raises ValueError: it is not the next, or the one before is not whole.
        """
        following = next(self._names, None)
        if self._left or following != name:
            raise ValueError(f"{self.path}: '{name}' comes where '{following}' should")
        self._name, self._left = name, torch.Size(self._shapes[name][1]).numel()

    def add(self, values: Tensor) -> None:
        """Flat elements on the CPU. Raises ValueError: too many, or of another dtype."""
        self._left -= values.numel()
        if self._left < 0 or values.dtype != self._shapes[self._name][0]:
            raise ValueError(f"{self.path}: '{self._name}' is of other elements")
        view = bytes_of(values)
        for start in range(0, len(view), _CHUNK):
            self._write(view[start : start + _CHUNK])

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)
        self._size += len(data)

    @property
    def written(self) -> Written:
        return Written(self._size, self._digest.hexdigest())

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                missing = self._name if self._left else next(self._names, None)
                if missing is not None:
                    raise ValueError(f"{self.path}: '{missing}' was announced and not written")
                self._file.flush()
                os.fsync(self._file.fileno())


def _header(
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], notes: Mapping[str, str]
) -> bytes:
    tree: dict[str, object] = {"__metadata__": dict(sorted(notes.items()))} if notes else {}
    end = 0
    for name, (dtype, shape) in sorted(shapes.items()):
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        tree[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> tuple[dict[str, Slot], dict[str, str]]:
    """What a safetensors file holds, and its notes; no tensor is read.

    Raises:
        CheckpointError: not such a file, cut short, or a header that does not describe its bytes.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            tree = json.loads(file.read(length))
        notes = tree.pop("__metadata__", None) or {}
        return _slots(tree, 8 + length, size), {str(k): str(v) for k, v in notes.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from None


def _slots(tree: Mapping[str, dict[str, object]], begin: int, size: int) -> dict[str, Slot]:
    slots = {}
    for name, entry in tree.items():
        dtype, shape = DTYPES[str(entry["dtype"])], tuple(map(int, entry["shape"]))  # type: ignore[call-overload]
        start, end = map(int, entry["data_offsets"])  # type: ignore[call-overload]
        numel = torch.Size(shape).numel()
        if min(shape, default=0) < 0 or start < 0 or end - start != numel * dtype.itemsize:
            raise ValueError(f"'{name}': {end - start} bytes for {shape} of {dtype}")
        if begin + end > size:
            raise ValueError(f"'{name}' ends beyond the file's {size} bytes")
        slots[name] = Slot(dtype, shape, begin + start, begin + end)
    return slots


def read_elements(path: Path, slot: Slot, first: int, out: Tensor) -> None:
    """Fill `out`, contiguous, on the CPU and of the slot's dtype, from element `first` on.

    Raises CheckpointError: the file has become shorter.
    """
    view = bytes_of(out.view(-1))
    at, end = slot.start + first * slot.dtype.itemsize, 0
    with path.open("rb", buffering=0) as file:
        file.seek(at)
        while end < len(view):
            count = file.readinto(view[end : end + _READ])
            if not count:
                raise CheckpointError(f"{path}: ends too soon")
            end += count


def bytes_of(values: Tensor) -> memoryview:
    """The memory of a flat tensor on the CPU."""
    return memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]


def digest(path: Path) -> str:
    """XXH3-128 of a file's bytes, in hex."""
    found, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()
