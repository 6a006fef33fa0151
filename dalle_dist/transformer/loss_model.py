"""The transformer with its loss as one tensor: what the engine trains.

Shape suffixes: B batch, T text positions, N image tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_dist.transformer.loss import cross_entropy_sum
from dalle_dist.transformer.model import Transformer


class LossTransformer(Transformer):
    """The transformer whose forward pass gives text sum, text count, image sum, image count.

    DeepSpeed hooks its gradient work onto the tensors that a forward pass returns and does not look
    into a dataclass: with one, bf16 under ZeRO-1 counts earlier micro-batches twice.
    """

    def forward(  # type: ignore[override]
        self, text_BT: Tensor, codes_BN: Tensor, seen_BN: Tensor | None = None
    ) -> Tensor:
        # The blocks know their dtypes; DeepSpeed's autocast is on where it reduces in fp16.
        with torch.autocast(text_BT.device.type, enabled=False):
            text, image = self.predictions(text_BT, codes_BN, seen_BN)
            return torch.stack([*cross_entropy_sum(*text), *cross_entropy_sum(*image)])
