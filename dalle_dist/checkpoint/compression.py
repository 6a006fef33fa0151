"""What PowerSGD goes on from, as safetensors: one file for each rank of a machine.

step-00001000/compression/rank-00000.safetensors   tensors `error/SHARD`, and `query/SHARD` where Q
is warm-started; step and seed in the header. The error is the machines' mean, so that any number of
them can go on from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle_dist.checkpoint.formats import load_tensors, read_notes, save_tensors

FOLDER = "compression"
_PARTS = {"errors": "error/", "queries": "query/"}
_NUMBERS = ("step", "seed")


def save_compression(checkpoint: Path, place: int, state: Mapping[str, Any]) -> None:
    """Write what `PowerSGD.state` gave."""
    tensors = {
        prefix + key: tensor
        for part, prefix in _PARTS.items()
        for key, tensor in state[part].items()
    }
    notes = {name: str(state[name]) for name in _NUMBERS}
    save_tensors(_file(checkpoint, place), tensors, notes)


def load_compression(checkpoint: Path, place: int) -> dict[str, Any]:
    """What `PowerSGD.load` takes. Raises CheckpointError when there is none."""
    path = _file(checkpoint, place)
    tensors, notes = load_tensors(path), read_notes(path)
    state: dict[str, Any] = {name: int(notes[name]) for name in _NUMBERS}
    for part, prefix in _PARTS.items():
        named = {k: t for k, t in tensors.items() if k.startswith(prefix)}
        state[part] = {key.removeprefix(prefix): tensor for key, tensor in named.items()}
    return state


def _file(checkpoint: Path, place: int) -> Path:
    return checkpoint / FOLDER / f"rank-{place:05d}.safetensors"
