"""Tensors on disk: safetensors files, written whole or not at all, and fingerprints of weights.

More than 5 GB are cut into several files with an index, as Hugging Face does.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dalle_dist import storage
from dalle_dist.checkpoint.tensor_file import TensorFile, bytes_of, read_header
from dalle_dist.errors import CheckpointError

State = dict[str, Tensor]
Tensors = Mapping[str, Tensor]  # also those that are read one by one
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Module = TypeVar("Module", bound=nn.Module)
SUFFIX = ".safetensors"  # of all files of tensors
INDEX = ".index.json"  # after the name that a single file would have
LARGEST_FILE = 5_000_000_000  # bytes
_BUFFER = 1 << 22  # elements


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for, each time anew.

    Args:
        shapes: dtype and shape of each, known without reading.
        read: fills the third argument, flat and in fp32, with the elements of a tensor from the
            second argument on.
    """

    def __init__(self, shapes: Shapes, read: Callable[[str, int, Tensor], None]) -> None:
        self.shapes, self._read = dict(sorted(shapes.items())), read

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self.shapes[name]
        values = torch.empty(torch.Size(shape).numel())
        self._read(name, 0, values)
        return values.view(shape).to(dtype)

    def parts(self, name: str, buffer: Tensor) -> Iterator[Tensor]:
        """A tensor's elements, flat, as many at a time as `buffer` has, and in its memory."""
        dtype, shape = self.shapes[name]
        numel = torch.Size(shape).numel()
        for start in range(0, numel, len(buffer)):
            part = buffer[: min(len(buffer), numel - start)]
            self._read(name, start, part)
            yield part.to(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _parts_of(state: Tensors, name: str, buffer: Tensor) -> Iterator[Tensor]:
    if isinstance(state, LazyTensors):
        yield from state.parts(name, buffer)
    else:
        yield state[name].detach().cpu().contiguous().reshape(-1)


def shapes_of(state: Tensors) -> Shapes:
    if isinstance(state, LazyTensors):
        return state.shapes
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(state.items())}


def save_tensors(path: Path | str, state: Tensors, notes: Mapping[str, str] | None = None) -> str:
    """Write `state` as safetensors; returns its fingerprint.

    Of `LazyTensors` no more than a few MB are in memory at a time.

    Equal tensors and notes give equal bytes. `notes` are kept in the header, for `read_notes`. A
    file appears whole or not at all; of several the index comes last.

    Raises DataError: cannot be written there.
    """
    path, shapes, digest = str(path), shapes_of(state), Fingerprint()
    parts = _parts(shapes)
    names = (
        [path] if len(parts) == 1 else [_numbered(path, i, len(parts)) for i in range(len(parts))]
    )
    buffer = torch.empty(_BUFFER if isinstance(state, LazyTensors) else 0)
    for name, part in zip(names, parts, strict=True):
        with tempfile.TemporaryDirectory(dir=_near(name), prefix=".writing-") as scratch:
            file = Path(scratch) / "tensors"
            with TensorFile(file, part, notes) as writer:
                for key, shape in part.items():
                    digest.begin(key, *shape)
                    writer.begin(key)
                    for values in _parts_of(state, key, buffer):
                        digest.add(values)
                        writer.add(values)
            storage.publish(file, name)
    if len(parts) > 1:
        places = {
            key: Path(name).name for name, part in zip(names, parts, strict=True) for key in part
        }
        size = sum(_bytes(*shape) for shape in shapes.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        storage.write_bytes(path + INDEX, json.dumps(index, indent=1).encode())
    return digest.hex


def _near(path: str) -> Path:
    """Where a file is written before it is moved to `path`."""
    if storage.is_remote(path):
        return storage.made(str(storage.cache_folder()))
    return storage.made(str(Path(storage.normal(path)).parent))


def _parts(shapes: Shapes) -> list[Shapes]:
    """The tensors of each file, in the order of their names."""
    parts: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        if parts[-1] and size + _bytes(*shape) > LARGEST_FILE:
            parts.append({})
            size = 0
        parts[-1][name] = shape
        size += _bytes(*shape)
    return parts


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * torch.Size(shape).numel()


def _numbered(path: str, number: int, count: int) -> str:
    return f"{path.removesuffix(SUFFIX)}-{number + 1:05d}-of-{count:05d}{SUFFIX}"


def has_tensors(path: Path | str) -> bool:
    """Whether `save_tensors` has written there."""
    return storage.exists(str(path)) or storage.exists(f"{path}{INDEX}")


def tensor_files(path: Path | str) -> list[str]:
    """The files that hold what `save_tensors` wrote. Raises CheckpointError: there are none."""
    path = str(path)
    if storage.exists(path):
        return [path]
    if not storage.exists(path + INDEX):
        raise CheckpointError(f"{path}: no such file")
    try:
        names = set(json.loads(storage.read_bytes(path + INDEX))["weight_map"].values())
        if not all(Path(name).name == name for name in names):
            raise ValueError("files outside of its folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}{INDEX}: not an index of safetensors ({error})") from None
    folder = path.rpartition("/")[0]
    return [storage.join(folder, name) for name in sorted(names)]


def shapes_in(files: Iterable[str]) -> Shapes:
    """What safetensors files hold; no tensor is read. Raises CheckpointError."""
    headers = [read_header(storage.fetch(file))[0] for file in files]
    slots = {name: slot for header in headers for name, slot in header.items()}
    return {name: (slot.dtype, slot.shape) for name, slot in sorted(slots.items())}


def load_tensors(path: Path | str) -> State:
    """Read what `save_tensors` wrote, local or remote; tensors that never change are mapped.

    Raises CheckpointError when absent or damaged.
    """
    state: State = {}
    for name in tensor_files(path):
        file = storage.fetch(name)
        read_header(file)  # its size is bounded here, before a library believes it
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name}: not a whole safetensors file ({error})") from None
    return state


def read_notes(path: Path | str) -> dict[str, str]:
    """The notes of what `load_tensors` reads; empty when it has none. Raises CheckpointError."""
    return read_header(storage.fetch(tensor_files(path)[0]))[1]


def fill(model: Module, state: State, path: str) -> Module:
    """The model with these weights in fp32, frozen; it may have been made on the meta device.

    Raises:
        CheckpointError: names or shapes do not fit; `path` is where they come from.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors do not fit its config, first '{wrong[0]}': config says "
            f"{expected.get(wrong[0], 'absent')}, file has {found.get(wrong[0], 'none')}"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


class Fingerprint:
    """16 hex digits that depend on every name, shape, dtype and bit; names come in their order."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """The next tensor, whose elements `add` takes."""
        self._digest.update(f"{name} {shape} {dtype}".encode())

    def add(self, values: Tensor) -> None:
        self._digest.update(bytes_of(values))

    @property
    def hex(self) -> str:
        return str(self._digest.hexdigest())[:16]


def fingerprint(state: Tensors) -> str:
    """That of tensors; `save_tensors` gives it too."""
    digest = Fingerprint()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.begin(name, tensor.dtype, tuple(tensor.shape))
        digest.add(tensor.reshape(-1))
    return digest.hex
