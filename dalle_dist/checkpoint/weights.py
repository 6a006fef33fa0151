"""A checkpoint's weights, readable without DeepSpeed: every rank's fp32 pieces as safetensors.

step-00001000/weights/ema-rank-00000.safetensors    the average        tensors `name@start`
                     /raw-rank-00000.safetensors    the master weights
Neither the ZeRO stage nor the number of ranks matters to a reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dalle_dist.checkpoint.formats import SUFFIX, State, load_tensors, save_tensors
from dalle_dist.errors import CheckpointError
from dalle_dist.gradients.piece import assemble

FOLDER = "weights"
KINDS = ("ema", "raw")


def save_pieces(checkpoint: Path, kind: str, rank: int, pieces: State) -> None:
    """Write one rank's pieces, by key; nothing for a rank that owns none."""
    if pieces:
        save_tensors(_file(checkpoint, kind, rank), pieces)


def load_pieces(checkpoint: Path, kind: str, rank: int) -> State:
    """What `save_pieces` wrote for this rank; empty when it owned none."""
    path = _file(checkpoint, kind, rank)
    return load_tensors(path) if path.exists() else {}


def load_weights(checkpoint: Path, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> State:
    """Whole tensors from all ranks' pieces, whatever the ZeRO stage.

    Raises:
        CheckpointError: no such weights there, or they do not fit `shapes`.
    """
    files = sorted((checkpoint / FOLDER).glob(f"{kind}-rank-*{SUFFIX}"))
    if not files:
        raise CheckpointError(f"{checkpoint}: no checkpoint ({FOLDER}/ is empty)")
    pieces = {key: values for file in files for key, values in load_tensors(file).items()}
    try:
        return assemble(pieces, shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None


def _file(checkpoint: Path, kind: str, rank: int) -> Path:
    return checkpoint / FOLDER / f"{kind}-rank-{rank:05d}{SUFFIX}"
