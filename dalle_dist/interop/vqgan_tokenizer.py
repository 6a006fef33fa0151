"""A VQGAN as an image tokenizer, and the checkpoints it comes from.

Shape suffixes as in `saved_tokenizer.py`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dalle_dist.checkpoint.formats import State, fill
from dalle_dist.errors import CheckpointError
from dalle_dist.interop.imported import ImportedTokenizer
from dalle_dist.interop.names import layers_of
from dalle_dist.interop.saved_tokenizer import SavedTokenizer
from dalle_dist.interop.vqgan import VQGAN, VQGANShape


class VQGANTokenizer(SavedTokenizer):
    """Its shape is a `VQGANShape` and `grid`. Codes are without the noise of its training."""

    kind: ClassVar[str] = "vqgan"
    model: VQGAN

    @staticmethod
    def build(shape: dict[str, Any]) -> nn.Module:
        fields = {key: _frozen(value) for key, value in shape.items() if key != "grid"}
        return VQGAN(VQGANShape(**fields))

    def codes(self, images_BCHW: Tensor) -> Tensor:
        return self.model.codes(2 * images_BCHW - 1)

    def images(self, codes_BGG: Tensor) -> Tensor:
        return (self.model.decode(codes_BGG).clamp(-1, 1) + 1) / 2


def is_vqgan(state: State) -> bool:
    """Whether these are a VQGAN's weights, with or without what trained it."""
    return any(name.endswith("encoder.conv_in.weight") for name in state)


def vqgan_of(state: State, path: str, grid: int) -> ImportedTokenizer:
    """The image tokenizer of a checkpoint's state dict, in fp32.

    Args:
        path: the file, for messages.
        grid: codes per side of the images it was trained on, which no weight tells.

    Raises:
        CheckpointError: not such a VQGAN, or one with parts that are not computed here.
    """
    if any(re.match(r"model\.|.*dwt", name) for name in state):
        raise CheckpointError(
            f"{path}: its decoder makes wavelets (DWT), which are not computed here; give the "
            "plain VQGAN (for ruDALL-E: vqgan.gumbelf8-sber.model.ckpt)"
        )
    kept = {name: tensor.float() for name, tensor in state.items() if not name.startswith("loss.")}
    try:
        shape = _shape(kept, grid)
    except (KeyError, IndexError, ZeroDivisionError):
        raise CheckpointError(f"{path}: not the checkpoint of a VQGAN") from None
    with torch.device("meta"):
        fill(VQGAN(shape), kept, path)
    return ImportedTokenizer({**dataclasses.asdict(shape), "grid": grid}, kept)


def _shape(state: State, grid: int) -> VQGANShape:
    width = len(state["encoder.conv_in.weight"])
    levels = layers_of(state, "encoder.down.")
    gumbel = "quantize.embed.weight" in state
    entries_KE = state[f"quantize.{'embed' if gumbel else 'embedding'}.weight"]
    return VQGANShape(
        width=width,
        multiples=tuple(
            len(state[f"encoder.down.{level}.block.0.conv2.weight"]) // width
            for level in range(levels)
        ),
        blocks=layers_of(state, "encoder.down.0.block."),
        attention=tuple(
            level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in state
        ),
        latent=len(state["encoder.conv_out.weight"]),
        code_width=entries_KE.shape[1],
        codebook_size=len(entries_KE),
        quantizer="gumbel" if gumbel else "nearest",
        image_size=grid << (levels - 1),
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
