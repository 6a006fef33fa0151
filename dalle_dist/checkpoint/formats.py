"""Tensors on disk: safetensors files, written whole or not at all, and fingerprints of weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dalle_dist import storage
from dalle_dist.errors import CheckpointError

State = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)
_NUMBERS = "numbers"
SUFFIX = ".safetensors"  # of all files of tensors but DeepSpeed's own


def save_tensors(path: Path | str, state: State, notes: dict[str, str] | None = None) -> None:
    """Write `state` as one safetensors file, atomically; tensors are copied to the CPU first.

    `notes` are kept in the file's header, for `read_notes`.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    storage.write_bytes(str(path), save(contiguous, notes))


def load_tensors(path: Path | str) -> State:
    """Read a safetensors file, local or remote. Raises CheckpointError when absent or damaged."""
    if not storage.exists(str(path)):
        raise CheckpointError(f"{path}: no such file")
    try:
        return load_file(storage.fetch(str(path)))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from None


def read_notes(path: Path | str) -> dict[str, str]:
    """The notes of a safetensors file that `load_tensors` reads; empty when it has none."""
    with safe_open(storage.fetch(str(path)), "pt") as file:
        return file.metadata() or {}


def save_tree(path: Path | str, tree: Mapping[str, Any]) -> None:
    """Write a nested mapping of tensors and of what JSON takes, as one safetensors file.

    Tensors are named by their keys, joined by "/"; the rest is in the file's header.
    """
    tensors = {"/".join(keys): leaf for keys, leaf in _leaves(tree) if isinstance(leaf, Tensor)}
    rest = [[keys, leaf] for keys, leaf in _leaves(tree) if not isinstance(leaf, Tensor)]
    save_tensors(path, tensors, {_NUMBERS: json.dumps(rest)})


def load_tree(path: Path | str) -> dict[str, Any]:
    """What `save_tree` wrote. Raises CheckpointError when absent or damaged."""
    tensors, notes = load_tensors(path), read_notes(path)
    leaves = [(key.split("/"), tensor) for key, tensor in tensors.items()]
    leaves += [(keys, leaf) for keys, leaf in json.loads(notes[_NUMBERS])]
    tree: dict[str, Any] = {}
    for (*parents, name), leaf in leaves:
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = leaf
    return tree


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[list[str], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from (([key, *keys], leaf) for keys, leaf in _leaves(value))
        else:
            yield [key], value


def fill(model: Module, state: State, path: str) -> Module:
    """The model with these weights, frozen; it may have been made on the meta device.

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
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def fingerprint(state: State) -> str:
    """16 hex digits that depend on every name, shape, dtype and bit of `state`."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
