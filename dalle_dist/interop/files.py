"""Files that a user names, and the tensors in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dalle_dist.checkpoint.formats import SUFFIX, State, load_tensors
from dalle_dist.interop.pickles import read_pickle

PICKLED = (".bin", ".ckpt", ".pt", ".pth")


def expanded(paths: Sequence[Path]) -> list[Path]:
    """The files, and those of the folders among them, in the order of their names."""
    return [
        file
        for path in paths
        for file in (sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path])
    ]


def tensors_of(path: Path) -> State:
    """The state dict in a file, also under `state_dict`; empty where there is none.

    Raises CheckpointError: a damaged file, or one with more than tensors in it.
    """
    if path.suffix == SUFFIX:
        return load_tensors(path)
    found = read_pickle(path) if path.suffix in PICKLED else {}
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
