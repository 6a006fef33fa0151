"""Discrete VAE: an image to a grid of codes and back (paper A.1; shapes as in the released one).

Shape suffixes: B batch, C colour channels, H and W pixels, K codebook entries, G codes per side,
S the six output maps (mu for RGB, then ln b for RGB), F feature channels, Y and X any height and
width.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_dist.config import Config, DVAEConfig
from dalle_dist.dvae import checks
from dalle_dist.dvae.loss import map_pixels, unmap_pixels

CHANNELS = 3


class Conv(nn.Conv2d):
    """Stride 1, same size; weights normal with deviation 1/sqrt(fan-in), biases zero."""

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        super().__init__(n_in, n_out, kernel, padding=(kernel - 1) // 2)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight[0].numel()))
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class FullPrecisionConv(Conv):
    """Computes in fp32 under autocast too: the convolutions on either side of the relaxation."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


class Block(nn.Module):
    """Bottleneck of four ReLU-convolutions beside a skip; a small gain keeps the start stable."""

    def __init__(self, n_in: int, n_out: int, kernels: Sequence[int], gain: float) -> None:
        super().__init__()
        self.gain = gain
        widths = [n_in, *[n_out // 4] * 3, n_out]
        self.residual = nn.ModuleList(map(Conv, widths[:-1], widths[1:], kernels))
        self.skip = Conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x_BFYX: Tensor) -> Tensor:
        residual_BFYX = x_BFYX
        for conv in self.residual:
            residual_BFYX = conv(F.relu(residual_BFYX))
        return self.skip(x_BFYX) + self.gain * residual_BFYX


def _groups(
    n_in: int, widths: Sequence[int], config: DVAEConfig, kernels: Sequence[int], resize: nn.Module
) -> tuple[OrderedDict[str, nn.Module], int]:
    """Groups of blocks with `resize` after each but the last; also their output width."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    gain = 1 / (len(widths) * config.blocks_per_group) ** 2
    for g, width in enumerate(widths):
        if g > 0:
            layers[f"resize_{g}"] = resize
        for b in range(config.blocks_per_group):
            layers[f"group_{g + 1}_block_{b + 1}"] = Block(n_in, width, kernels, gain)
            n_in = width
    return layers, n_in


def _encoder(config: DVAEConfig, widths: Sequence[int]) -> nn.Sequential:
    layers, n_out = _groups(widths[0], widths, config, (3, 3, 3, 1), nn.MaxPool2d(2))
    layers["relu"] = nn.ReLU()
    layers["output"] = FullPrecisionConv(n_out, config.codebook_size, 1)
    return nn.Sequential(OrderedDict(input=Conv(CHANNELS, widths[0], 7), **layers))


def _decoder(config: DVAEConfig, widths: Sequence[int]) -> nn.Sequential:
    stem = config.decoder_stem
    upsample = nn.Upsample(scale_factor=2, mode="nearest")
    layers, n_out = _groups(stem, widths[::-1], config, (1, 3, 3, 3), upsample)
    layers["relu"] = nn.ReLU()
    layers["output"] = Conv(n_out, 2 * CHANNELS, 1)
    return nn.Sequential(
        OrderedDict(input=FullPrecisionConv(config.codebook_size, stem, 1), **layers)
    )


class DVAE(nn.Module):
    """Encoder to logits over the codebook, decoder from (soft) codes to logit-Laplace parameters.

    With the paper's sizes: 53,786,240 parameters in `encoder`, 43,829,766 in `decoder`.
    """

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width << g for g in range(config.downsamplings + 1)]
        self.encoder = _encoder(config, widths)
        self.decoder = _decoder(config, widths)

    def encode_logits(self, images_BCHW: Tensor) -> Tensor:
        """Images, floats in [0, 1], to fp32 logits_BKGG over the codebook.

        Height and width may differ, but must be multiples of 2**downsamplings.

        Raises:
            ValueError: another shape or dtype. Values are not looked at, which would hold up
                training; `codes` does.
        """
        checks.images_fit(images_BCHW, self.config.downsamplings)
        return self.encoder(map_pixels(images_BCHW))

    def codes(self, images_BCHW: Tensor) -> Tensor:
        """Images, floats in [0, 1], to their likeliest codes_BGG, int64 (paper 2.2).

        Raises:
            ValueError: another shape or dtype, or a value outside [0, 1].
        """
        checks.images_fit(images_BCHW, self.config.downsamplings)
        checks.values_fit(images_BCHW)
        return self.encode_logits(images_BCHW).argmax(dim=1)

    def decode_soft(self, z_BKGG: Tensor) -> Tensor:
        """Points of the codebook's simplex to fp32 stats_BSHW: mu of RGB, then ln b of RGB."""
        return self.decoder(z_BKGG).float()

    def decode(self, codes_BGG: Tensor) -> Tensor:
        """Codes, int64, to images images_BCHW in [0, 1]; ln b is ignored (paper A.3).

        Raises:
            ValueError: another shape or dtype, or a code that is not in the codebook.
        """
        checks.codes_fit(codes_BGG, self.config.codebook_size)
        first, *rest = self.decoder
        assert isinstance(first, Conv) and first.bias is not None
        # A 1x1 convolution of one-hot codes is a look-up; one-hot, 64 of the paper's images
        # would be 6 GB.
        x_BGGF = F.embedding(codes_BGG, first.weight[:, :, 0, 0].T) + first.bias
        stats_BSHW = nn.Sequential(*rest)(x_BGGF.permute(0, 3, 1, 2)).float()
        return unmap_pixels(torch.sigmoid(stats_BSHW[:, :CHANNELS]))

    def forward(
        self, images_BCHW: Tensor, gumbel_BKGG: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Training path: (logits_BKGG, stats_BSHW) of a Gumbel-softmax relaxation, soft both ways.

        `gumbel_BKGG` is standard Gumbel noise; the relaxation tends to one-hot samples of the
        encoder's categorical distribution as `temperature` falls to 0.
        """
        logits_BKGG = self.encode_logits(images_BCHW)
        z_BKGG = torch.softmax((logits_BKGG + gumbel_BKGG) / temperature, dim=1)
        return logits_BKGG, self.decode_soft(z_BKGG)


def configured_dvae(config: Config) -> DVAE:
    """The dVAE that a whole config describes, with its first weights."""
    return DVAE(config.dvae)


def decayed(model: nn.Module) -> list[str]:
    """Names of the parameters with weight decay: all, as AdamW does if nothing is said (A.2)."""
    return [name for name, _ in model.named_parameters()]
