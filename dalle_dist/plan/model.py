"""Sizes of the model to be planned, asked of the model itself, which is built without memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from dalle_dist.config import Config, TransformerConfig
from dalle_dist.errors import ConfigError
from dalle_dist.gradients.resblocks import Resblocks
from dalle_dist.transformer.blocks import resblock_map
from dalle_dist.transformer.registry import build_transformer


@dataclass(frozen=True)
class Model:
    """Shapes by name, in the order of the model's parameters.

    resblocks       which parameters are in resblocks; its matrices are what PowerSGD compresses
    attention_size  channels times (query, key) pairs that the masks allow, of all layers
    """

    shapes: dict[str, tuple[int, ...]]
    resblocks: Resblocks
    attention_size: int
    transformer: TransformerConfig
    text_classes: int

    @classmethod
    def of(cls, config: Config) -> Model:
        """Raises ConfigError: an architecture whose work is not counted here."""
        if config.transformer.architecture != "paper":
            raise ConfigError(
                f"transformer.architecture: {config.transformer.architecture} cannot be planned; "
                "paper can"
            )
        with torch.device("meta"):
            model = build_transformer(config)
        return cls(
            {name: tuple(p.shape) for name, p in model.named_parameters()},
            resblock_map(model),
            model.attention_size(),
            config.transformer,
            config.tokenizer.vocab_size,
        )

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Values of each parameter."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @cached_property
    def matrices(self) -> int:
        """Values in the matrices of resblocks, which the paper counts."""
        return sum(math.prod(shape) for shape in self.resblocks.matrices.values())

    @cached_property
    def parameters(self) -> int:
        return sum(self.sizes.values())

    @property
    def others(self) -> int:
        """Gains, biases, embeddings and unembeddings: fp32 in fp16 runs, and without decay."""
        return self.parameters - self.matrices

    @property
    def flop(self) -> float:
        """Of the training of one sequence: forward, and backward as two of it (`train/flop.py`)."""
        return 3 * (2 * self.matrices * self.transformer.tokens + 4 * self.attention_size)

    def logits(self, samples: int) -> int:
        """Values, all text positions counted, which is the most there can be."""
        shape = self.transformer
        text = shape.text_tokens * self.text_classes
        return samples * (text + shape.image_tokens * shape.codebook_size)
