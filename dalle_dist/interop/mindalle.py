"""minDALL-E's transformer: t1 ... tT | z1 ... z(N-1), causal, pre-norm, with a head for each half.

Nothing stands before the text: no position predicts its first token. Captions end in pads, which
are one class like any other.

Shape suffixes: B batch, M targets that count, N image positions, T text tokens, W width, V text
classes, K codebook entries.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dalle_dist.config import Config
from dalle_dist.interop.base import InteropTransformer, checked_options
from dalle_dist.interop.layers import Layer, LayerShape, init_weights
from dalle_dist.transformer.embeddings import LayerNorm


class MinDALLE(InteropTransformer):
    """Its option `pad` is the id that pads have in the program's own files."""

    starts: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        checked_options(config, {"pad": 0})
        super().__init__(config)
        shape, width = config.transformer, config.transformer.width
        self.text_embedding = nn.Embedding(config.tokenizer.vocab_size, width)
        self.text_position = nn.Parameter(torch.empty(shape.text_tokens, width))
        self.image_embedding = nn.Embedding(shape.codebook_size, width)
        self.image_position = nn.Parameter(torch.empty(shape.image_tokens, width))
        layer = LayerShape(width, shape.heads, "none", sandwich=False)
        self.blocks = nn.ModuleList(Layer(layer) for _ in range(shape.layers))
        self.norm = LayerNorm(width)
        self.text_head = nn.Parameter(torch.empty(config.tokenizer.vocab_size, width))
        self.image_head = nn.Parameter(torch.empty(shape.codebook_size, width))
        init_weights(self)

    def embed_text(self, text_BT: Tensor) -> Tensor:
        return self.text_embedding(text_BT).float() + self.text_position.float()

    def embed_codes(self, codes_BN: Tensor, at_BN: Tensor) -> Tensor:
        return self.image_embedding(codes_BN).float() + self.image_position[at_BN].float()

    def mask(self, layer: int) -> Tensor | None:
        return None

    def text_logits(self, x_MW: Tensor) -> Tensor:
        return linear(self.norm(x_MW).float(), self.text_head.float())

    def image_logits(self, x_BNW: Tensor) -> Tensor:
        return linear(self.norm(x_BNW).float(), self.image_head.float())
