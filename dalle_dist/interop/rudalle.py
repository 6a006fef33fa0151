"""ruDALL-E (Malevich, Emojich, Kandinsky): the transformer, in both versions of its program.

    version 2   begin t1 ... tT | z1 ... z(N-1)    image positions stand at the cell they predict
    version 3         t1 ... tT | z1 ... z(N-1)    they stand at the cell whose code they hold

Where a mask hides a key the program puts a score of -10000, of which softmax leaves 0 in fp32, as
of minus infinity; it takes the greatest score off all others, which changes nothing. The dropout
with which it was trained is left out.

Shape suffixes: B batch, M targets that count, L text positions, T text tokens, N image positions,
W width, V text classes and pads, K codebook entries.
"""

from __future__ import annotations

import functools

import torch
from dalle_kernels.masks import AttentionMask
from torch import Tensor, nn
from torch.nn.functional import linear

from dalle_dist.choices import MaskVariant
from dalle_dist.config import Config
from dalle_dist.errors import ConfigError
from dalle_dist.interop.base import InteropTransformer, checked_options
from dalle_dist.interop.layers import Layer, LayerShape, init_weights
from dalle_dist.text_tokenizer.protocol import PAD
from dalle_dist.transformer.embeddings import LayerNorm, Unembedding

VARIANTS: dict[int, MaskVariant] = {2: "torus", 3: "clamp"}  # of the convolutional mask, by version
KERNEL = 11  # side of its window
BEGIN = 2  # the id before a text
LEARNED = 0.1  # share of the embeddings' gradient that is kept


class RuDALLE(InteropTransformer):
    """Each text position has a pad of its own, a class after those of the tokenizer."""

    def __init__(self, config: Config) -> None:
        version = checked_options(config, {"version": 3})["version"]
        shape, width = config.transformer, config.transformer.width
        if shape.mask_variant != VARIANTS.get(version):
            raise ConfigError(
                f"interop.options.version: {version} is not 2 with transformer.mask_variant=torus, "
                "or 3 with clamp"
            )
        self.starts = version == 2  # type: ignore[misc]
        super().__init__(config)
        self.classes = config.tokenizer.vocab_size + shape.text_tokens
        self.text_embedding = nn.Embedding(self.classes, width)
        self.text_position = nn.Parameter(torch.empty(shape.text_tokens + 1, width))
        self.image_embedding = nn.Embedding(shape.codebook_size, width)
        self.image_row = nn.Parameter(torch.empty(shape.image_grid, width))
        self.image_column = nn.Parameter(torch.empty(shape.image_grid, width))
        layer = LayerShape(width, shape.heads, "tanh", sandwich=True)
        self.blocks = nn.ModuleList(Layer(layer) for _ in range(shape.layers))
        self.norm, self.second_norm = LayerNorm(width), LayerNorm(width)
        self.unembedding = Unembedding(width, self.classes + shape.codebook_size)
        init_weights(self)

    def embed_text(self, text_BT: Tensor) -> Tensor:
        ids_BL = self.text_targets(text_BT)
        if self.starts:
            ids_BL = torch.cat([torch.full_like(ids_BL[:, :1], BEGIN), ids_BL], dim=1)
        position_LW = self.text_position[: ids_BL.shape[1]]
        return _slowed(self.text_embedding(ids_BL).float() + position_LW.float())

    def embed_codes(self, codes_BN: Tensor, at_BN: Tensor) -> Tensor:
        grid = self.config.transformer.image_grid
        position = (self.image_row[at_BN // grid] + self.image_column[at_BN % grid]).float()
        return _slowed(self.image_embedding(codes_BN).float() + position)

    def mask(self, layer: int) -> Tensor | None:
        shape = self.config.transformer
        kind = "conv" if layer == shape.layers - 1 else "row"
        kind = "column" if layer % 4 == 1 else kind
        seen = dense_mask(kind, shape.text_tokens, shape.image_grid, shape.mask_variant)
        return seen[: self.positions, : self.positions]

    def text_logits(self, x_MW: Tensor) -> Tensor:
        return self._logits(x_MW, slice(None, self.classes))

    def image_logits(self, x_BNW: Tensor) -> Tensor:
        return self._logits(x_BNW, slice(self.classes, None))

    def text_targets(self, text_BT: Tensor) -> Tensor:
        length = text_BT.shape[1]
        pads_T = torch.arange(self.classes - length, self.classes, device=text_BT.device)
        return torch.where(text_BT == PAD, pads_T, text_BT)

    def _logits(self, x_BNW: Tensor, classes: slice) -> Tensor:
        last = self.unembedding
        x_BNW = self.second_norm(self.norm(x_BNW)).float()
        return linear(x_BNW, last.weight[classes].float(), last.bias[classes].float())


@functools.lru_cache(maxsize=8)
def dense_mask(kind: str, text: int, grid: int, variant: str) -> Tensor:
    """bool, query by key of all text and image positions; `KERNEL` is the conv mask's window."""
    return AttentionMask(kind, text, grid, variant, KERNEL).dense()


def _slowed(x_BNW: Tensor) -> Tensor:
    """The same values, with a share of the gradient."""
    return x_BNW * LEARNED + x_BNW.detach() * (1 - LEARNED)
