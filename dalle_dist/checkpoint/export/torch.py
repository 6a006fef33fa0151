"""One file of `torch.save`: a plain dict of whole tensors, which loads with `weights_only=True`.

A pickle of torch's holds all tensors at once: P parameters need 4 P bytes of memory (2 P in 16
bits). A release folder says the same in safetensors and is written tensor by tensor.
"""

from __future__ import annotations

import torch

from dalle_dist import storage
from dalle_dist.checkpoint.convert import weights_of
from dalle_dist.checkpoint.export.files import Export
from dalle_dist.checkpoint.manifest import Manifest
from dalle_dist.errors import ConfigError

SUFFIX = ".pt"


def write(
    checkpoint: str,
    manifest: Manifest,
    out: str,
    weights: str = "ema",
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Write a checkpoint's weights as the file `out`; the files written.

    Args:
        checkpoint: a step folder, verified; `manifest` is its.
        weights: "ema", the average, or "raw", the fp32 master weights.

    Raises:
        CheckpointError: not all there, or `out` is there already.
        ConfigError: `out` is no name of such a file.
        DataError: cannot be written there.
    """
    if not out.endswith(SUFFIX):
        raise ConfigError(f"{out}: name a file that ends in {SUFFIX}")
    folder, _, name = storage.normal(out).rpartition("/")
    export = Export(folder or ".", name)
    export.save(name, dict(weights_of(checkpoint, manifest, weights, dtype)))
    return export.files
