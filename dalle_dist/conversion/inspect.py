"""`dalle-dist convert --inspect`: what a source holds, without making anything of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_dist import storage
from dalle_dist.checkpoint.formats import (
    SUFFIX,
    Shapes,
    State,
    fingerprint,
    load_tensors,
    shapes_in,
    shapes_of,
    tensor_files,
)
from dalle_dist.conversion.source import (
    CheckpointSource,
    PeerSource,
    ReleaseSource,
    find_source,
)
from dalle_dist.errors import CheckpointError
from dalle_dist.interop.files import PICKLED, expanded
from dalle_dist.interop.pickles import read_pickle, read_state
from dalle_dist.stages import STAGES

PICKLES = (*PICKLED, ".pkl")
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def inspect(paths: Sequence[str]) -> Iterator[str]:
    """Lines: format, step, layout, size, fingerprints, and each tensor's name, dtype and shape.

    Raises CheckpointError: nothing that is known, or damaged.
    """
    if len(paths) == 1 and paths[0].endswith(".safetensors"):
        yield f"{paths[0]}: safetensors"
        yield from _table(shapes_in([paths[0]]))
        return
    source = find_source(paths)
    yield str(source)
    if isinstance(source, CheckpointSource):
        yield from _checkpoint(source)
    elif isinstance(source, ReleaseSource):
        yield from _release(source)
    else:
        yield from _peer(source)


def _checkpoint(source: CheckpointSource) -> Iterator[str]:
    manifest = source.manifest
    yield f"  versions: {_pairs(manifest.versions)}"
    yield f"  layout: {_pairs(manifest.layout)}"
    yield f"  size: {_size(manifest.size)} in {len(manifest.files)} files, each as it was written"
    yield f"  trained with: {_pairs(manifest.training['fingerprints']) or 'no other model'}"
    yield f"  samples consumed: {manifest.training['data']['samples']:,}"
    for kind in manifest.kinds:
        entries = manifest.of_kind(kind).values()
        elements = sum(sum(entry.pieces.values()) for entry in entries)
        size = sum(entry.bytes for entry in entries)
        yield f"  {kind}: {elements:,} elements, {_size(size)}, in {len(entries)} files"
    shapes = manifest.training["shapes"]
    yield from _table({name: (torch.float32, tuple(s)) for name, s in sorted(shapes.items())})


def _release(source: ReleaseSource) -> Iterator[str]:
    for name in storage.list_files(source.path):
        yield f"  {name}"
    files = tensor_files(storage.join(source.path, STAGES[source.stage].weights))
    yield from _table(shapes_in(files))


def _peer(source: PeerSource) -> Iterator[str]:
    for path in expanded(source.paths):
        state = _tensors_in(path)
        if state:
            yield f"  {path.name}: fingerprint {fingerprint(state)}"
            yield from _table(shapes_of(state))


def _tensors_in(path: Path) -> State:
    """Of a file of any program; none in a tokenizer or a text."""
    if path.suffix == SUFFIX:
        return load_tensors(path)
    if path.suffix not in PICKLES:
        return {}
    try:
        return read_state(path)
    except CheckpointError:
        return dict(_leaves(read_pickle(path), ""))


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


def _table(shapes: Shapes) -> Iterator[str]:
    elements = sum(torch.Size(shape).numel() for _, shape in shapes.values())
    yield f"  {len(shapes):,} tensors of {elements:,} elements"
    width = max(map(len, shapes), default=0)
    for name, (dtype, shape) in shapes.items():
        text = _NAMES.get(dtype, str(dtype).removeprefix("torch."))
        yield f"    {name:<{width}}  {text:>5}  {' x '.join(map(str, shape)) or 'scalar'}"


def _pairs(mapping: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in mapping.items())


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
