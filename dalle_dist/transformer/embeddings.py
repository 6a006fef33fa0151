"""Embeddings of text and image positions, and the two unembeddings.

Values are fp32 whatever the parameters' dtype: they start the residual stream, and logits are
kept in fp32 (paper 2.4). Shape suffixes: B batch, T text, N image positions, W width, V classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dalle_kernels import generation
from torch import Tensor, nn
from torch.func import functional_call

from dalle_dist.text_tokenizer.protocol import PAD


class TextEmbedding(nn.Module):
    """Token, or that position's own learned pad, plus position; `scale` times their sum."""

    def __init__(self, vocab_size: int, positions: int, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.token = nn.Embedding(vocab_size, width)
        self.pad = nn.Parameter(torch.empty(positions, width))
        self.position = nn.Parameter(torch.empty(positions, width))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Tokens of the text positions (START first, PAD after the text) to x_BTW."""
        x_BTW = self.token(tokens_BT).float()
        x_BTW = torch.where((tokens_BT == PAD)[..., None], self.pad.float(), x_BTW)
        return self.scale * (x_BTW + self.position.float())


class ImageEmbedding(nn.Module):
    """Code, or start-of-image, plus row and column of the cell to be predicted, times `scale`."""

    def __init__(self, codebook_size: int, grid: int, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.start, self.scale = codebook_size, scale
        self.code = nn.Embedding(codebook_size + 1, width)
        self.row = nn.Parameter(torch.empty(grid, width))
        self.column = nn.Parameter(torch.empty(grid, width))

    def forward(self, codes_BN: Tensor, first: int | Tensor = 0) -> Tensor:
        """Codes of the image positions from `first` on to x_BNW; position 0 holds `self.start`.

        `first` is one for all, also as a tensor of no dimension, or one of each sample, [B].
        Positions past the image, which are computed for nobody, count as its last.
        """
        count = codes_BN.shape[1]
        if isinstance(first, int):
            position_NW = (self.row[:, None] + self.column[None, :]).flatten(0, 1).float()
            return self.scale * (self.code(codes_BN).float() + position_NW[first : first + count])
        at_BN = first[..., None] + torch.arange(count, device=first.device)
        at_BN, grid = at_BN.clamp(max=self.row.shape[0] * self.column.shape[0] - 1), len(self.row)
        at_BNW = (self.row[at_BN // grid] + self.column[at_BN % grid]).float()
        return self.scale * (self.code(codes_BN).float() + at_BNW)


class Unembedding(nn.Linear):
    """fp32 logits from a linear layer of any dtype."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias)


class LayerNorm(nn.LayerNorm):
    """Statistics in fp32; the result in the parameters' dtype, in which the block computes."""

    # Optional fused layer norm, in a tuple so that nn.Module does not register it.
    kernel: tuple[nn.Module] | None = None

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        if self.kernel is None:
            out = F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)
        else:
            parameters = {"weight": weight, "bias": bias}
            out = functional_call(self.kernel[0], parameters, input.float())
        return out.to(self.weight.dtype)

    def after(self, x_W: Tensor, branch_W: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + branch, its norm), without gradients; None is nothing to add."""
        if generation.runs_on(x_W.device):
            return generation.add_norm(x_W, branch_W, self.weight, self.bias, self.eps)
        x_W = x_W if branch_W is None else x_W + branch_W
        return x_W, self(x_W)


def use_layer_norm(model: nn.Module, kernel: type[nn.Module]) -> None:
    """Have every layer norm computed by `kernel`, of the interface of nn.LayerNorm."""
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.kernel = (kernel(module.normalized_shape, eps=module.eps),)
