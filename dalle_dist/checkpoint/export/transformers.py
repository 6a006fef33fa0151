"""A folder in the layout of Hugging Face's `transformers`: config.json and model.safetensors.

`transformers` has no class that computes the paper's transformer or dVAE: its `AutoModel` does not
know their `model_type` and says so. The folder is for classes of one's own, derived from its
`PreTrainedModel`, whose `from_pretrained` takes it, and for tools that read that layout; names of
tensors are those of our modules. A CLIP's release is a whole model of that library already: make
that one.

Memory: one tensor at a time. More than 5 GB are cut into several files with an index.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from dalle_dist import storage
from dalle_dist.checkpoint.convert import read_training, weights_of
from dalle_dist.checkpoint.formats import INDEX, SUFFIX, save_tensors, tensor_files
from dalle_dist.checkpoint.manifest import Manifest
from dalle_dist.errors import CheckpointError, ConfigError

CONFIG, WEIGHTS_FILE = "config.json", f"model{SUFFIX}"
# Sections of our config that a model of the stage is built from.
_SECTIONS = {"transformer": ("transformer", "tokenizer"), "dvae": ("dvae",)}


def write(
    checkpoint: str,
    manifest: Manifest,
    out: str,
    weights: str = "ema",
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Write a checkpoint's weights as such a folder, config last; the files written.

    Args:
        checkpoint: a step folder, verified; `manifest` is its.
        weights: "ema", the average, or "raw", the fp32 master weights.

    Raises:
        CheckpointError: not all there, of no stage, or `out` holds a model already.
        ConfigError: a CLIP, whose release is such a folder.
        DataError: cannot be written there.
    """
    stage = read_training(checkpoint, manifest)["stage"]
    if stage not in _SECTIONS:
        raise ConfigError(
            f"{checkpoint}: a {stage}, whose release is a folder of transformers already; "
            "convert it to a release"
        )
    config, path = storage.join(out, CONFIG), storage.join(out, WEIGHTS_FILE)
    if storage.exists(config):
        raise CheckpointError(f"{out}: holds a model already ({CONFIG}); choose another folder")
    # `from_pretrained` refuses weights that do not say by whom they can be read.
    save_tensors(path, weights_of(checkpoint, manifest, weights, dtype), {"format": "pt"})
    text = json.dumps(_config(stage, manifest.config, dtype), indent=2)
    storage.write_bytes(config, f"{text}\n".encode())
    index = [] if storage.exists(path) else [f"{path}{INDEX}"]
    return [*tensor_files(path), *index, config]


def _config(stage: str, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        "model_type": f"dalle-dist-{stage}",
        "dtype": str(dtype).removeprefix("torch."),
        **{section: config[section] for section in _SECTIONS[stage]},
    }
