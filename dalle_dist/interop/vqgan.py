"""The VQGAN of Esser et al. 2021 (arXiv 2012.09841), under the parameter names of its authors.

So minDALL-E's stage 1, the image tokenizer of ruDALL-E and other checkpoints of theirs need no key
map. Pixels go in and come out in [-1, 1].

Shape suffixes: B batch, C channels, H and W pixels or cells, E width of a codebook entry,
K codebook entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

COLOURS, GROUPS = 3, 32


@dataclass(frozen=True)
class VQGANShape:
    """What the network is made of.

    width          channels at full resolution
    multiples      of each level, its channels as a multiple of them; a level halves the side
    blocks         resblocks of a level of the encoder; the decoder has one more
    attention      levels whose resblocks are followed by self-attention
    latent         channels between encoder and quantizer
    code_width     size of a codebook entry
    codebook_size  entries
    quantizer      nearest: the entry at the least distance; gumbel: the one of the highest logit
    image_size     pixels per side it was trained on
    """

    width: int
    multiples: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    latent: int
    code_width: int
    codebook_size: int
    quantizer: Literal["nearest", "gumbel"]
    image_size: int

    @property
    def channels(self) -> list[int]:
        """Of each level."""
        return [self.width * multiple for multiple in self.multiples]


class VQGAN(nn.Module):
    """Encoder, quantizer and decoder, without what trained them."""

    def __init__(self, shape: VQGANShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder, self.decoder = Encoder(shape), Decoder(shape)
        self.quant_conv = nn.Conv2d(shape.latent, shape.code_width, 1)
        self.post_quant_conv = nn.Conv2d(shape.code_width, shape.latent, 1)
        quantizer = Nearest if shape.quantizer == "nearest" else Gumbel
        self.quantize = quantizer(shape)

    def codes(self, images_BCHW: Tensor) -> Tensor:
        """codes_BHW, int64."""
        codes_BHW: Tensor = self.quantize.codes(self.quant_conv(self.encoder(images_BCHW)))
        return codes_BHW

    def decode(self, codes_BHW: Tensor) -> Tensor:
        """images_BCHW, which may leave [-1, 1]."""
        entries_BEHW = self.quantize.entries(codes_BHW).movedim(-1, 1)
        images_BCHW: Tensor = self.decoder(self.post_quant_conv(entries_BEHW))
        return images_BCHW


class Nearest(nn.Module):
    """Codes are the entries at the least Euclidean distance."""

    def __init__(self, shape: VQGANShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.codebook_size, shape.code_width)

    def codes(self, z_BEHW: Tensor) -> Tensor:
        z_BHWE = z_BEHW.movedim(1, -1)
        # |z - e|^2 without |z|^2, which is the same for all entries.
        weight_KE = self.embedding.weight
        return (weight_KE.square().sum(1) - 2 * z_BHWE @ weight_KE.T).argmin(-1)

    def entries(self, codes_BHW: Tensor) -> Tensor:
        entries_BHWE: Tensor = self.embedding(codes_BHW)
        return entries_BHWE


class Gumbel(nn.Module):
    """Codes are the entries of the highest logit; its authors' program adds noise to the logits."""

    def __init__(self, shape: VQGANShape) -> None:
        super().__init__()
        self.proj = nn.Conv2d(shape.code_width, shape.codebook_size, 1)
        self.embed = nn.Embedding(shape.codebook_size, shape.code_width)

    def codes(self, z_BEHW: Tensor) -> Tensor:
        logits_BKHW: Tensor = self.proj(z_BEHW)
        return logits_BKHW.argmax(1)

    def entries(self, codes_BHW: Tensor) -> Tensor:
        entries_BHWE: Tensor = self.embed(codes_BHW)
        return entries_BHWE


class Encoder(nn.Module):
    """Images to latents, level 0 first."""

    def __init__(self, shape: VQGANShape) -> None:
        super().__init__()
        channels = shape.channels
        self.conv_in = nn.Conv2d(COLOURS, shape.width, 3, padding=1)
        self.down = nn.ModuleList()
        for level, (before, after) in enumerate(
            zip([shape.width, *channels], channels, strict=False)
        ):
            stage = Stage(before, after, shape.blocks, level in shape.attention)
            if level < len(channels) - 1:
                stage.downsample = Downsample(after)
            self.down.append(stage)
        self.mid = Middle(channels[-1])
        self.norm_out = _norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], shape.latent, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(x_BCHW)
        for stage in self.down:
            x_BCHW = stage(x_BCHW)
        z_BCHW: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x_BCHW))))
        return z_BCHW


class Decoder(nn.Module):
    """Latents to images, the last level first."""

    def __init__(self, shape: VQGANShape) -> None:
        super().__init__()
        channels = shape.channels
        self.conv_in = nn.Conv2d(shape.latent, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1])
        self.up = nn.ModuleList()
        for level, after in enumerate(channels):
            before = channels[min(level + 1, len(channels) - 1)]
            stage = Stage(before, after, shape.blocks + 1, level in shape.attention)
            if level:
                stage.upsample = Upsample(after)
            self.up.append(stage)
        self.norm_out = _norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], COLOURS, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        x_BCHW = self.mid(self.conv_in(z_BCHW))
        for stage in reversed(self.up):
            x_BCHW = stage(x_BCHW)
        images_BCHW: Tensor = self.conv_out(F.silu(self.norm_out(x_BCHW)))
        return images_BCHW


class Stage(nn.Module):
    """Resblocks of one level, each followed by attention where there is any, then the resize."""

    def __init__(self, before: int, after: int, blocks: int, attention: bool) -> None:
        super().__init__()
        inputs = [before, *[after] * (blocks - 1)]
        self.block = nn.ModuleList(Resblock(channels, after) for channels in inputs)
        self.attn = nn.ModuleList(Attention(after) for _ in range(blocks * attention))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if self.attn:
                x_BCHW = self.attn[i](x_BCHW)
        for name in ("downsample", "upsample"):
            if name in self._modules:
                x_BCHW = getattr(self, name)(x_BCHW)
        return x_BCHW


class Middle(nn.Module):
    """Resblock, attention, resblock at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = Resblock(channels, channels), Resblock(channels, channels)
        self.attn_1 = Attention(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.block_2(self.attn_1(self.block_1(x_BCHW)))
        return out_BCHW


class Resblock(nn.Module):
    """Twice norm, SiLU and convolution; added to the input, projected where widths differ."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(before), _norm(after)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        if "nin_shortcut" in self._modules:
            x_BCHW = self.nin_shortcut(x_BCHW)
        return x_BCHW + h_BCHW


class Attention(nn.Module):
    """Attention of one head over all cells, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.norm(x_BCHW)
        q_BNC, k_BNC, v_BNC = (
            layer(h_BCHW).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        seen_BNC = F.scaled_dot_product_attention(q_BNC, k_BNC, v_BNC)
        return x_BCHW + self.proj_out(seen_BNC.transpose(1, 2).reshape(x_BCHW.shape))


class Downsample(nn.Module):
    """Half the side; zeros are added to the right and below alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))
        return out_BCHW


class Upsample(nn.Module):
    """Twice the side: each pixel repeated, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return out_BCHW


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)
