"""Tensors on disk: safetensors files, written whole or not at all, and fingerprints of weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from dalle_dist.data import storage
from dalle_dist.errors import CheckpointError

State = dict[str, Tensor]


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


def fingerprint(state: State) -> str:
    """16 hex digits that depend on every name, shape, dtype and bit of `state`."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
