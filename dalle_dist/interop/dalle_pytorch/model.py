"""DALLE-pytorch's transformer: text and image in one sequence and one softmax's weights.

A start token of id 0 stands before the text; a pad is a class of its own at each position, after
all of the tokenizer's. Its `stable` softmax is the same function, so that it changes here only how
embeddings learn and what goes into the last norm.

Shape suffixes: B batch, L text positions with the start, T text tokens, N image tokens, S
positions, W width, M targets, V text classes with the pads, K codebook entries.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_dist.config import Config
from dalle_dist.errors import ConfigError
from dalle_dist.interop.base import InteropTransformer, checked_options
from dalle_dist.interop.dalle_pytorch.layers import (
    Attention,
    GatedMLP,
    Layer,
    ScaledBranch,
    Shift,
)
from dalle_dist.interop.dalle_pytorch.rotary import Rotary
from dalle_dist.text_tokenizer.protocol import PAD
from dalle_dist.transformer.embeddings import LayerNorm, Unembedding

# Its own names of its hyper-parameters, in their types; without ids every layer has its own.
OPTIONS: dict[str, Any] = {
    "dim_head": 64,
    "attn_types": ["full"],
    "reversible": False,
    "stable": False,
    "sandwich_norm": False,
    "shift_tokens": True,
    "rotary_emb": True,
    "shared_attn_ids": [],
    "shared_ff_ids": [],
    "share_input_output_emb": False,
    "attn_dropout": 0.0,
    "ff_dropout": 0.0,
    "loss_img_weight": 7.0,
}
KERNEL = 5  # cells up and to the left that `conv_like` sees, its own among them
Inner = Attention | GatedMLP
LEARNING = 0.1  # share of the gradient that embeddings get with `stable`


class DALLEPytorch(InteropTransformer):
    """Parameters have plain names of ours; `names.py` has the program's."""

    starts: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        shape, self.options = config.transformer, checked_options(config, OPTIONS)
        self.text_classes = config.tokenizer.vocab_size + shape.text_tokens
        total, width, grid = self.text_classes + shape.codebook_size, shape.width, shape.image_grid
        if not self.options["share_input_output_emb"]:
            self.text_embedding = nn.Embedding(self.text_classes, width)
            self.image_embedding = nn.Embedding(shape.codebook_size, width)
        if not self.options["rotary_emb"]:
            self.text_position = nn.Parameter(torch.zeros(self.text_length, width))
            self.image_row = nn.Parameter(torch.zeros(grid, width))
            self.image_column = nn.Parameter(torch.zeros(grid, width))
        self.kinds = list(islice(cycle(self.options["attn_types"]), shape.layers))
        _check_kinds(self.kinds)
        self.blocks = nn.ModuleList(_layers(config, self.options, self.text_length))
        self.norm = LayerNorm(width)
        self.unembedding = Unembedding(width, total)

    def embed_text(self, text_BT: Tensor) -> Tensor:
        ids_BL = F.pad(self.text_targets(text_BT), (1, 0), value=0)
        x_BLW = F.embedding(ids_BL, self._embeddings()[0]).float()
        if not self.options["rotary_emb"]:
            x_BLW = x_BLW + self.text_position.float()
        return self._stream(x_BLW)

    def embed_codes(self, codes_BN: Tensor, at_BN: Tensor) -> Tensor:
        x_BNW, grid = (
            F.embedding(codes_BN, self._embeddings()[1]).float(),
            self.config.transformer.image_grid,
        )
        if not self.options["rotary_emb"]:
            x_BNW = x_BNW + self.image_row[at_BN // grid] + self.image_column[at_BN % grid]
        return self._stream(x_BNW)

    def mask(self, layer: int) -> Tensor | None:
        return dense_mask(self.kinds[layer], self.text_length, self.config.transformer.image_grid)

    def text_logits(self, x_MW: Tensor) -> Tensor:
        weight, bias = self.unembedding.weight, self.unembedding.bias
        return _linear(self._last(x_MW), weight[: self.text_classes], bias[: self.text_classes])

    def image_logits(self, x_BNW: Tensor) -> Tensor:
        weight, bias = self.unembedding.weight, self.unembedding.bias
        return _linear(self._last(x_BNW), weight[self.text_classes :], bias[self.text_classes :])

    def text_targets(self, text_BT: Tensor) -> Tensor:
        pads_T = torch.arange(text_BT.shape[1], device=text_BT.device)
        return torch.where(text_BT == PAD, self.config.tokenizer.vocab_size + pads_T, text_BT)

    def attention_width(self) -> int:
        return int(self.config.transformer.heads * self.options["dim_head"])

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        if self.options["share_input_output_emb"]:
            weight = self.unembedding.weight
            return weight[: self.text_classes], weight[self.text_classes :]
        return self.text_embedding.weight, self.image_embedding.weight

    def _stream(self, x_BNW: Tensor) -> Tensor:
        if self.options["stable"]:
            x_BNW = LEARNING * x_BNW + (1 - LEARNING) * x_BNW.detach()
        return torch.cat([x_BNW, x_BNW], dim=-1) if self.options["reversible"] else x_BNW

    def _last(self, x_MW: Tensor) -> Tensor:
        if self.options["reversible"]:
            x_MW = sum(x_MW.chunk(2, dim=-1)) / 2  # type: ignore[assignment]
        if self.options["stable"]:
            x_MW = x_MW / x_MW.amax(dim=-1, keepdim=True).detach()
        normed_MW: Tensor = self.norm(x_MW)
        return normed_MW


def dense_mask(kind: str, text: int, grid: int) -> Tensor | None:
    """bool [S, S] on the CPU of a kind of attention; None: all that is before.

    Cells are those of the inputs: that of the first code stands after the last text position.
    """
    if kind == "full":
        return None
    cell = torch.arange(grid**2 - 1, device="cpu")
    row, column = cell // grid, cell % grid
    down, right = row[:, None] - row[None, :], column[:, None] - column[None, :]
    if kind == "axial_row":
        near = (down == 0) & (right >= 0)
    elif kind == "axial_col":
        near = (right == 0) & (down >= 0)
    else:
        near = (down >= 0) & (right >= 0) & (down < KERNEL) & (right < KERNEL)
    size = (text + len(cell), text + len(cell))
    seen = torch.ones(size, dtype=torch.bool, device="cpu").tril()
    seen[text:, text:] = near
    return seen


def _layers(config: Config, options: dict[str, Any], text: int) -> list[Layer]:
    shape, head = config.transformer, options["dim_head"]
    rotary = Rotary(text, shape.image_grid, head) if options["rotary_emb"] else None
    attentions = _inner(
        options["shared_attn_ids"],
        shape.layers,
        lambda: Attention(shape.width, shape.heads, head, rotary, options["attn_dropout"]),
    )
    mlps = _inner(
        options["shared_ff_ids"],
        shape.layers,
        lambda: GatedMLP(shape.width, options["ff_dropout"]),
    )

    def branch(inner: Inner, owned: bool) -> ScaledBranch:
        shift = Shift(text, shape.image_grid) if options["shift_tokens"] else None
        sandwich = options["sandwich_norm"]
        return ScaledBranch(shape.width, inner, owned=owned, shift=shift, sandwich=sandwich)

    return [
        Layer(branch(*attention), branch(*mlp), options["reversible"])
        for attention, mlp in zip(attentions, mlps, strict=True)
    ]


def _inner(ids: list[Any], layers: int, make: Callable[[], Inner]) -> list[tuple[Inner, bool]]:
    """Of each layer what is inside of its branch, and whether it is the layer's own."""
    found: list[tuple[Inner, bool]] = []
    for layer in range(layers):
        own = owner(ids, layer)
        found.append((make(), True) if own == layer else (found[own][0], False))
    return found


def owner(ids: list[Any], layer: int) -> int:
    """The first layer with the id of this one; ids are repeated as often as it takes."""
    if not ids:
        return layer
    wanted = ids[layer % len(ids)]
    return next(n for n in range(layer + 1) if ids[n % len(ids)] == wanted)


def _check_kinds(kinds: list[Any]) -> None:
    known = ("full", "axial_row", "axial_col", "conv_like")
    for kind in kinds:
        if kind not in known:
            raise ConfigError(
                f"interop.options.attn_types: {kind!r} is not one of {', '.join(known)}"
            )


def _linear(x_MW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x_MW.float(), weight.float(), bias.float())
