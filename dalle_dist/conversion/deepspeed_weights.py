"""The fp32 weights in a DeepSpeed folder that was just written, put together again.

An account of the layout of its own, beside that of `checkpoint/export/`, so that a mistake in one
shows. Files are read by the unpickler that knows tensors only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_dist import storage
from dalle_dist.interop.pickles import read_pickle


def deepspeed_weights(files: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each parameter, from the files of any ZeRO stage."""
    model = _trees(files, r"mp_rank_00_model_states\.pt$")[0]
    ranks = [tree["optimizer_state_dict"] for tree in _trees(files, r"optim_states\.pt$")]
    if not ranks:  # without ZeRO the model is whole, in bf16 where it computes in bf16
        yield from model["module"].items()
        return
    cut = "fp32_flat_groups" in ranks[0]
    name = "fp32_flat_groups" if cut else "single_partition_of_fp32_groups"
    for number, shapes in enumerate(model["param_shapes"]):
        flats = [rank[name][number] for rank in ranks]
        yield from (_each_cut if cut else _joined)(shapes, flats)


def _trees(files: Sequence[str], pattern: str) -> list[Any]:
    found = [file for file in files if re.search(pattern, file)]
    return [read_pickle(storage.fetch(file)) for file in sorted(found, key=_rank)]


def _rank(file: str) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", file)
    return int(found[1]) if found else 0


def _joined(
    shapes: Mapping[str, Sequence[int]], flats: Sequence[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Stages 1 and 2: one rank's elements follow the other's."""
    flat, at = torch.cat(list(flats)), 0
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        yield name, flat[at : at + numel].view(tuple(shape))
        at += numel


def _each_cut(
    shapes: Mapping[str, Sequence[int]], flats: Sequence[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Stage 3: every parameter is cut among all ranks, the last parts filled up."""
    at = 0
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        part = -(-numel // len(flats))
        whole = torch.cat([flat[at : at + part] for flat in flats])
        yield name, whole[:numel].view(tuple(shape))
        at += part
