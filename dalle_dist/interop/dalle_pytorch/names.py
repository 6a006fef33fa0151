"""DALLE-pytorch's names of its weights, and ours.

Wrappers add a `fn` each to a name, how many depends on the version and the options: on the way in a
run of them counts as one, on the way out there are as many as version 1.6.6 has.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from dalle_dist.checkpoint.formats import State
from dalle_dist.config import Config
from dalle_dist.errors import CheckpointError
from dalle_dist.interop.dalle_pytorch.model import owner
from dalle_dist.interop.dalle_pytorch.rotary import Rotary

_LAYER = re.compile(
    r"transformer\.layers\.(?:layers\.(\d+)\.([01])|blocks\.(\d+)\.([fg])\.net)\.(.+)"
)
_PARTS = {"0": "attention", "f": "attention", "1": "mlp", "g": "mlp"}
_LEAVES = {
    "scale": "gain",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "norm_out.weight": "norm_out.weight",
    "norm_out.bias": "norm_out.bias",
    "to_qkv.weight": "inner.qkv.weight",
    "to_out.0.weight": "inner.out.weight",
    "to_out.0.bias": "inner.out.bias",
    "net.0.weight": "inner.up.weight",
    "net.0.bias": "inner.up.bias",
    "net.3.weight": "inner.down.weight",
    "net.3.bias": "inner.down.bias",
}
_OTHERS = {
    "text_emb.weight": "text_embedding.weight",
    "image_emb.weight": "image_embedding.weight",
    "text_pos_emb.weight": "text_position",
    "image_pos_emb.weights.0": "image_row",
    "image_pos_emb.weights_0": "image_row",
    "image_pos_emb.weights.1": "image_column",
    "image_pos_emb.weights_1": "image_column",
    "to_logits.0.weight": "norm.weight",
    "to_logits.0.bias": "norm.bias",
    "to_logits.1.weight": "unembedding.weight",
    "to_logits.1.bias": "unembedding.bias",
}
_TIED = ("text_emb.linear.", "image_emb.linear.")  # the unembedding's again
ANGLES = "transformer.pos_emb"


def without_wrappers(name: str) -> tuple[int, str, str] | None:
    """(layer, part, leaf) of a name in a layer, and None of others."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    layer, part = match[1] or match[3], match[2] or match[4]
    return int(layer), _PARTS[part], re.sub(r"^(fn\.)+", "", match[5])


def wrappers(name: str) -> int:
    """How many there are around what is inside of a layer."""
    return len(re.findall(r"\.fn(?=\.)", name))


def ours(weights: State, config: Config) -> State:
    """The transformer's weights by our names, in fp32; those of the image tokenizer left out.

    Raises CheckpointError: a name that is not known, or rotary angles that are not ours.
    """
    found: State = {}
    for name, tensor in weights.items():
        if name == ANGLES:
            _check_angles(tensor, config)
        elif not name.startswith(("vae.", *_TIED)):
            key = _ours(name, config.interop.options)
            if key is not None:
                found[key] = tensor.float()
    for layer in range(config.transformer.layers):
        for part in ("attention", "mlp"):
            gain = f"blocks.{layer}.{part}.gain"  # the first versions had none
            found.setdefault(gain, torch.ones(config.transformer.width))
    return {name: _without_axes(name, tensor) for name, tensor in found.items()}


def theirs(state: State, config: Config) -> State:
    """By the names of version 1.6.6, all that its `load_state_dict` asks for."""
    options, shape = config.interop.options, config.transformer
    found = {
        name: state[own] for name, own in _OTHERS.items() if own in state and "weights_" not in name
    }
    for axis, name in enumerate(("image_pos_emb.weights.0", "image_pos_emb.weights.1")):
        if name in found:
            found[name] = found[name].unsqueeze(0).unsqueeze(2 - axis)
    for layer in range(shape.layers):
        found |= _layer_theirs(state, layer, options)
    if options["share_input_output_emb"]:
        for tied in _TIED:
            for leaf in ("weight", "bias"):
                found[f"{tied}{leaf}"] = state[f"unembedding.{leaf}"]
    if options["rotary_emb"]:
        found[ANGLES] = _rotary(config).angles()[None]
    return found


def _ours(name: str, options: dict[str, Any]) -> str | None:
    place = without_wrappers(name)
    if place is None:
        if name in _OTHERS:
            return _OTHERS[name]
        raise CheckpointError(f"{name}: no weight of DALLE-pytorch that is known here")
    layer, part, leaf = place
    if leaf not in _LEAVES:
        raise CheckpointError(f"{name}: no weight of DALLE-pytorch that is known here")
    shared = _LEAVES[leaf].startswith("inner.") and owner(_ids(options, part), layer) != layer
    return None if shared else f"blocks.{layer}.{part}.{_LEAVES[leaf]}"


def _without_axes(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Axes of one element, which gains and the positions of the image have there."""
    if name.endswith(".gain"):
        return tensor.flatten()
    return tensor.flatten(0, -2) if name in ("image_row", "image_column") else tensor


def _layer_theirs(state: State, layer: int, options: dict[str, Any]) -> State:
    found = {}
    for number, part in enumerate(("attention", "mlp")):
        place = f"layers.{layer}.{number}"
        if options["reversible"]:
            place = f"blocks.{layer}.{'fg'[number]}.net"
        # Around what is inside: the gain, the norm, the cache of attention, and two for the shift.
        around = 2 + (part == "attention") + 2 * options["shift_tokens"]
        for leaf, own in _LEAVES.items():
            inner, at = own.startswith("inner."), layer
            if inner:
                at = owner(_ids(options, part), layer)
            tensor = state.get(f"blocks.{at}.{part}.{own}")
            if tensor is None:
                continue
            run = ".fn" * (around if inner else leaf != "scale")
            value = tensor[None, None] if leaf == "scale" else tensor
            found[f"transformer.layers.{place}{run}.{leaf}"] = value
    return found


def _ids(options: dict[str, Any], part: str) -> list[Any]:
    ids: list[Any] = options["shared_attn_ids" if part == "attention" else "shared_ff_ids"]
    return ids


def _rotary(config: Config) -> Rotary:
    shape = config.transformer
    return Rotary(shape.text_tokens + 1, shape.image_grid, config.interop.options["dim_head"])


def _check_angles(angles_1SR: torch.Tensor, config: Config) -> None:
    wanted_SR = _rotary(config).angles()
    if angles_1SR.shape[1:] != wanted_SR.shape or not torch.allclose(
        angles_1SR[0].float(), wanted_SR, rtol=1e-4, atol=1e-4
    ):
        raise CheckpointError(f"{ANGLES}: other rotary angles than those of version 1.6.6")
