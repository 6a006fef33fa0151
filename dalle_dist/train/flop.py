"""Model FLOP of the training of one sample: what the model needs, whatever the hardware then does.

A backward pass counts as two forward passes (gradients of inputs and of weights); activations that
are computed again, optimizer and moving average count nothing.

Shape suffixes: B batch, C channels, H and W pixels, K codebook entries, G codes per side.
"""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle_dist.config import CLIPConfig, Config, DVAEConfig
from dalle_dist.dvae.model import CHANNELS, DVAE
from dalle_dist.transformer.blocks import resblock_map
from dalle_dist.transformer.registry import build_transformer

PASSES = 3  # forward, and backward as two of them


@torch.no_grad()
def dvae_flop(config: DVAEConfig, device: torch.device) -> float:
    """Of one image: the convolutions, counted in a forward pass of an image of zeros."""
    dvae = DVAE(config).to(device)
    image_BCHW = torch.zeros(1, CHANNELS, config.image_size, config.image_size, device=device)
    noise_BKGG = torch.zeros(1, config.codebook_size, config.grid, config.grid, device=device)
    with FlopCounterMode(display=False) as counter:
        dvae(image_BCHW, noise_BKGG, 1.0)
    return float(PASSES * counter.get_total_flops())


def transformer_flop(config: Config) -> float:
    """Of one sequence: the resblocks' matrices, and attention on the pairs that its masks allow.

    Embeddings and unembeddings are left out.
    """
    with torch.device("meta"):
        model = build_transformer(config)
    matrices = resblock_map(model).matrices.values()
    weights = sum(math.prod(shape) for shape in matrices)
    # Queries with keys, then weights with values: each a product and a sum per pair and channel.
    attention = 4 * model.attention_size()
    return float(PASSES * (2 * weights * config.transformer.tokens + attention))


def clip_flop(config: CLIPConfig) -> float:
    """Of one pair: both encoders and their projections; the loss, which depends on the batch, not.

    Attention of the captions counts the pairs that their causal mask allows.
    """
    patches = (config.image_size // config.patch_size) ** 2
    patch = 2 * patches * CHANNELS * config.patch_size**2 * config.image_width
    image = _encoder(patches + 1, config.image_layers, config.image_width, (patches + 1) ** 2)
    positions = config.text_tokens
    causal = positions * (positions + 1) // 2
    text = _encoder(positions, config.text_layers, config.text_width, causal)
    projections = 2 * config.features * (config.image_width + config.text_width)
    return float(PASSES * (patch + image + text + projections))


def _encoder(positions: int, layers: int, width: int, pairs: int) -> int:
    """FLOP of one forward pass: 12 width**2 weights a layer at each position, and attention."""
    return layers * (2 * 12 * width**2 * positions + 4 * pairs * width)
