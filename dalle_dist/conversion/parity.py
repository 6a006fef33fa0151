"""How far what was written is from what was read.

Shape suffixes: B samples, T text tokens, N image tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dalle_dist import storage
from dalle_dist.checkpoint.formats import SUFFIX, LazyTensors, Shapes, fill, shapes_of, tensor_files
from dalle_dist.checkpoint.read import TensorSource
from dalle_dist.config import Config
from dalle_dist.conversion.deepspeed_weights import deepspeed_weights
from dalle_dist.dvae.model import configured_dvae
from dalle_dist.errors import CheckpointError
from dalle_dist.interop import importing
from dalle_dist.interop.imported import Imported
from dalle_dist.interop.importing import apart, captions, draw
from dalle_dist.interop.pickles import read_pickle, read_state
from dalle_dist.stages import STAGES
from dalle_dist.transformer.registry import build_transformer

LARGEST_MODEL = 4_000_000_000  # bytes in fp32, up to which two models are run side by side


def release_parity(
    stage: str, config: Config, state: Mapping[str, Tensor], release: str
) -> dict[str, float]:
    """Largest differences between weights and those of the release made of them, by what differs.

    Weights one by one; up to `LARGEST_MODEL`, what both models make of fixed inputs too.
    """
    files = tensor_files(storage.join(release, STAGES[stage].weights))
    written, shapes = TensorSource.of_files(files), shapes_of(state)
    found = {"weights": 0.0}
    for name, (_, shape) in shapes.items():
        found["weights"] = max(found["weights"], apart(state[name], written.tensor(name, shape)))
    if fp32_bytes(shapes) > LARGEST_MODEL or stage not in ("transformer", "dvae"):
        return found
    again = LazyTensors(
        {name: (torch.float32, shape) for name, (_, shape) in shapes.items()},
        written.read,
    )
    before, after = outputs(stage, config, state), outputs(stage, config, again)
    return found | {name: apart(before[name], after[name]) for name in before}


def fp32_bytes(shapes: Shapes) -> int:
    return 4 * sum(torch.Size(shape).numel() for _, shape in shapes.values())


@torch.no_grad()
def outputs(stage: str, config: Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model with these weights makes of fixed inputs."""
    with torch.device("meta"):
        model = build_transformer(config) if stage == "transformer" else configured_dvae(config)
    fill(model, dict(state), "the weights")
    if stage == "dvae":
        codes_BGG = draw(config.dvae.codebook_size, (1, config.dvae.grid, config.dvae.grid))
        images_BCHW = model.decode(codes_BGG)  # type: ignore[operator]
        return {"images": images_BCHW}
    text_BT = captions(config)
    codes_BN = draw(config.transformer.codebook_size, (2, config.transformer.image_tokens))
    text_BTV, image_BNK = model.logits(text_BT, codes_BN)  # type: ignore[operator]
    return {"text logits": text_BTV, "image logits": image_BNK}


def in_words(differences: Mapping[str, float]) -> str:
    return "largest difference: " + ", ".join(f"{k} {v:.3g}" for k, v in differences.items())


def export_parity(
    goal: str, out: str, files: Sequence[str], state: Mapping[str, Tensor]
) -> dict[str, float]:
    """As `release_parity`, of the fp32 weights in an export; tests alone compare its moments."""
    worst, seen = 0.0, set()
    for name, written in _exported(goal, out, files, state):
        worst = max(worst, apart(state[name], written))
        seen.add(name)
    if seen != set(state):
        raise CheckpointError(f"{out}: holds {len(seen)} of {len(state)} tensors")
    return {"weights": worst}


def _exported(
    goal: str, out: str, files: Sequence[str], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each tensor that was written."""
    if goal == "torch":
        yield from read_state(storage.fetch(out)).items()
    elif goal == "transformers":
        source = TensorSource.of_files([f for f in files if f.endswith(SUFFIX)])
        for name, (_, shape) in shapes_of(state).items():
            yield name, source.tensor(name, shape)
    elif goal == "deepspeed":
        yield from deepspeed_weights(files)
    else:
        for file in files:
            found = re.search(r"/zero/(.+)/fp32\.pt$", file)
            if found:
                yield found[1], read_pickle(storage.fetch(file))["param"]


def imported_parity(one: Imported, other: Imported) -> dict[str, float]:
    """As `release_parity`, of two models of other programs."""
    theirs = importing.outputs(other)
    return {name: apart(values, theirs[name]) for name, values in importing.outputs(one).items()}
