"""Files of `torch.save`, without running what is in them: zip files, and those of before 1.6.

Tensors are views of the file, mapped into memory: what nobody looks at is not read. Writing to them
changes a page of this process alone.
"""

from __future__ import annotations

import io
import mmap
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_dist.checkpoint.formats import SUFFIX, State, load_tensors
from dalle_dist.errors import CheckpointError
from dalle_dist.interop.unpickler import Record, Unpickler, module_state

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LOCAL_HEADER = 30  # bytes before a record's name in a zip file


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """The object in a file: plain containers, numbers, texts, tensors, and records of the rest.

    Raises:
        CheckpointError: no such file, not one of `torch.save`, or one that asks for a call that
            making tensors does not need.
    """
    try:
        with Path(path).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return _read_zip(file, mapped) if zipfile.is_zipfile(file) else _read_legacy(mapped)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:
        # A damaged pickle makes its reader fail in any way.
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not a whole file of torch.save ({line})") from None


def read_state(path: str | os.PathLike[str]) -> State:
    """Tensors by name of a safetensors file, a state dict, or a whole module.

    Raises CheckpointError: none of these, beside the errors of `read_pickle`.
    """
    if str(path).endswith(SUFFIX):
        return load_tensors(Path(path))
    found = read_pickle(path)
    try:
        return module_state(found) if isinstance(found, Record) else tensors_of(found, str(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def tensors_of(tree: Any, where: str) -> State:
    """A mapping of names to tensors, checked. Raises CheckpointError, naming `where`."""
    if not isinstance(tree, Mapping) or not tree:
        raise CheckpointError(f"{where}: holds no tensors by name")
    for name, tensor in tree.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{where}: {name!r} is not the name of a tensor")
    return dict(tree)


def _read_zip(file: Any, mapped: mmap.mmap) -> Any:
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
    for name in records:
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise CheckpointError(f"has a record {name!r} outside of the archive")
    (pickled,) = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    folder = pickled.removesuffix("data.pkl")

    def read(name: str) -> tuple[int, int]:
        if name not in records:
            raise CheckpointError(f"lacks its record {name!r}")
        return _extent(mapped, records[name])

    if f"{folder}byteorder" in records:
        start, size = read(f"{folder}byteorder")
        if mapped[start : start + size] != b"little":
            raise CheckpointError("was written on a big-endian machine, which is not read")

    def storage(key: str, dtype: torch.dtype, elements: int) -> Tensor:
        start, size = read(f"{folder}data/{key}")
        return _elements(mapped, start, size, dtype, elements)

    start, size = read(pickled)
    return Unpickler(io.BytesIO(mapped[start : start + size]), storage).load()


def _extent(mapped: mmap.mmap, info: zipfile.ZipInfo) -> tuple[int, int]:
    """First byte and size of a record, which torch never compresses."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise CheckpointError(f"has a compressed record {info.filename!r}")
    lengths = mapped[info.header_offset + 26 : info.header_offset + _LOCAL_HEADER]
    start = info.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", lengths))
    return start, info.file_size


def _read_legacy(mapped: mmap.mmap) -> Any:
    if Unpickler(mapped).load() != _MAGIC or Unpickler(mapped).load() != _PROTOCOL:  # type: ignore[arg-type]
        raise CheckpointError("not a file of torch.save")
    Unpickler(mapped).load()  # type: ignore[arg-type]
    begin, wanted = mapped.tell(), dict[str, tuple[torch.dtype, int]]()

    def note(key: str, dtype: torch.dtype, elements: int) -> Tensor:
        if wanted.setdefault(key, (dtype, elements)) != (dtype, elements):
            raise CheckpointError(f"has two storages of the key {key!r}")
        return torch.empty(elements, dtype=dtype, device="meta")

    # Storages come after the pickle that needs them: it is gone through twice.
    Unpickler(mapped, note).load()  # type: ignore[arg-type]
    storages = _legacy_storages(mapped, wanted)
    mapped.seek(begin)
    return Unpickler(mapped, lambda key, *_: storages[key]).load()  # type: ignore[arg-type]


def _legacy_storages(
    mapped: mmap.mmap, wanted: Mapping[str, tuple[torch.dtype, int]]
) -> dict[str, Tensor]:
    """By key, in the order of the list of keys that stands before them."""
    keys, found = Unpickler(mapped).load(), {}  # type: ignore[arg-type]
    if not isinstance(keys, list) or set(keys) != set(wanted):
        raise CheckpointError("has other storages than its tensors need")
    for key in keys:
        dtype, elements = wanted[key]
        (count,) = struct.unpack("<q", mapped.read(8))
        size = elements * dtype.itemsize
        if count != elements:
            raise CheckpointError(f"has a storage {key!r} of {count} elements, not {elements}")
        found[key] = _elements(mapped, mapped.tell(), size, dtype, elements)
        mapped.seek(size, os.SEEK_CUR)
    return found


def _elements(
    mapped: mmap.mmap, start: int, size: int, dtype: torch.dtype, elements: int
) -> Tensor:
    if size != elements * dtype.itemsize or start + size > len(mapped):
        raise CheckpointError(f"has a storage of {size} bytes for {elements} elements of {dtype}")
    if not elements:
        return torch.empty(0, dtype=dtype)
    if start % dtype.itemsize:
        copy = bytearray(mapped[start : start + size])
        return torch.frombuffer(copy, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=elements, offset=start)
