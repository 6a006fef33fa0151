"""A transformer with its loss as one tensor: what the engine trains.

Shape suffixes: B batch, T text positions, N image tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_dist.config import Config
from dalle_dist.errors import ConfigError
from dalle_dist.transformer.loss import cross_entropy_sum
from dalle_dist.transformer.model import Transformer
from dalle_dist.transformer.protocol import TextImageTransformer
from dalle_dist.transformer.registry import transformer_class


class WithLoss(TextImageTransformer):
    """A transformer whose forward pass gives text sum, text count, image sum, image count.

    DeepSpeed hooks its gradient work onto the tensors that a forward pass returns and does not look
    into a dataclass: with one, bf16 under ZeRO-1 counts earlier micro-batches twice.
    """

    def forward(  # type: ignore[override]
        self,
        text_BT: Tensor,
        codes_BN: Tensor,
        seen_BN: Tensor | None = None,
        counted_M: Tensor | None = None,
    ) -> Tensor:
        # The blocks know their dtypes; DeepSpeed's autocast is on where it reduces in fp16.
        with torch.autocast(text_BT.device.type, enabled=False):
            text, image = self.predictions(text_BT, codes_BN, seen_BN, counted_M)
            return torch.stack([*cross_entropy_sum(*text), *cross_entropy_sum(*image)])


class LossTransformer(WithLoss, Transformer):
    """The paper's."""


def loss_transformer(config: Config) -> TextImageTransformer:
    """The config's transformer with its loss; its parameters have the names they have without.

    Raises ConfigError: fp16 of an imported model, whose blocks have no gradient scales.
    """
    found = transformer_class(config)
    if found is Transformer:
        return LossTransformer(config)
    if config.train.precision == "fp16":
        raise ConfigError("train.precision: fp16 is for transformer.architecture=paper; use bf16")
    kind = type(f"Loss{found.__name__}", (WithLoss, found), {})
    return kind(config)


def unmade_transformer(config: Config) -> TextImageTransformer:
    """`loss_transformer` on the meta device, where the engine can make its first weights.

    Other architectures draw their own, and come with them on the host.
    """
    with torch.device("meta"):
        model = loss_transformer(config)
    return loss_transformer(config) if model.initials() is None else model
