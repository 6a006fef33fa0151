"""What each position of the sequence holds and predicts (arXiv 2102.12092, 2.2 and Fig. 10).

    inputs   start t1 ... t(T-1) | start-of-image z1 ... z(N-1)
    targets  t1    t2 ... tT     | z1             z2 ... zN

Image position s stands at the cell that it predicts: row s // grid, column s % grid.
Shape suffixes: B batch, T text tokens, N image tokens.
"""

from __future__ import annotations

import torch
from dalle_kernels.masks import AttentionMask
from torch import Tensor

from dalle_dist.config import TransformerConfig
from dalle_dist.text_tokenizer.protocol import PAD, START


def layer_masks(config: TransformerConfig) -> list[AttentionMask]:
    """Row, column, row, row, row, column, ... and conv in the last layer (paper B.1)."""

    def kind(layer: int) -> str:
        if config.masks == "causal":
            return "causal"
        if layer == config.layers - 1:
            return "conv"
        return "column" if layer % 4 == 1 else "row"

    return [
        AttentionMask(
            kind(layer),
            config.text_tokens,
            config.image_grid,
            config.mask_variant,
            config.conv_kernel,
        )
        for layer in range(config.layers)
    ]


def text_inputs(text_BT: Tensor) -> Tensor:
    """Captions, padded with PAD, to the tokens that the text positions hold."""
    return torch.cat([torch.full_like(text_BT[:, :1], START), text_BT[:, :-1]], dim=1)


def counted_text_targets(text_BT: Tensor) -> Tensor:
    """bool: text, and the pad that ends it; later pads teach nothing, nor does an empty caption.

    The empty caption replaces others at random: that text ends at once is not to be learned.
    """
    is_text_BT = text_BT != PAD
    after_text_BT = torch.cat([torch.zeros_like(is_text_BT[:, :1]), is_text_BT[:, :-1]], dim=1)
    return is_text_BT | after_text_BT


def counted_indices(text_BT: Tensor) -> Tensor:
    """Those targets by their indices in the flattened captions, int64 [M].

    Of captions on a GPU the host must wait for M; asked of those on the host, it need not.
    """
    return counted_text_targets(text_BT).flatten().nonzero().flatten()
