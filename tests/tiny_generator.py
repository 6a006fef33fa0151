"""A generator of 4 x 4 image tokens with random weights, for the tests of sampling."""

import torch

from dalle_dist.config import load
from dalle_dist.dvae.model import DVAE
from dalle_dist.generate.generator import Generator
from dalle_dist.generate.noise import gumbel
from dalle_dist.generate.sampler import FREE, choose
from dalle_dist.image_tokenizer.dvae import DVAETokenizer
from dalle_dist.text_tokenizer.bpe import PAD, train_tokenizer
from dalle_dist.transformer.model import Transformer

TINY = [
    "sampling.guidance=1",
    "transformer.layers=4", "transformer.width=64", "transformer.heads=1",
    "transformer.text_tokens=6", "transformer.image_grid=4", "transformer.conv_kernel=3",
    "tokenizer.vocab_size=300", "dvae.image_size=8", "dvae.downsamplings=1", "dvae.width=8",
    "dvae.decoder_stem=8", "dvae.codebook_size=20", "transformer.codebook_size=20",
]  # fmt: skip


def build(*overrides, dtype=torch.float32):
    torch.manual_seed(0)
    config = load("emoji", [*TINY, *overrides])
    model = Transformer(config).eval().requires_grad_(False).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm." not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    # So that a token hangs on those before it, and not on its noise alone.
    model.image_embedding.code.weight.mul_(5)
    tokenizer = train_tokenizer(["a red heart", "a blue car"], 300)
    return Generator(model, tokenizer, DVAETokenizer(DVAE(config.dvae)), config, "f" * 16)


def text(size=3):
    text_BT = torch.randint(2, 250, (size, 6), generator=torch.Generator().manual_seed(5))
    text_BT[0, 2:] = PAD
    return text_BT


@torch.no_grad()
def recomputed(model, text_BT, seeds, sampling, kept_codes=None):
    """Every one of 16 tokens from all logits of the whole sequence, computed anew."""
    device = text_BT.device
    codes_BN = torch.zeros(len(seeds), 16, device=device).long()
    seed_B = torch.tensor([(s + 2**63) % 2**64 - 2**63 for s in seeds], device=device)
    for position in range(16):
        logits_BK = model.logits(text_BT, codes_BN)[1][:, position]
        empty_BK = model.logits(torch.full_like(text_BT, PAD), codes_BN)[1][:, position]
        weight = sampling.guidance_at(position, 16)
        logits_BK = empty_BK + weight * (logits_BK - empty_BK)
        noise_BK = gumbel(seed_B, torch.full_like(seed_B, position), 20)
        codes_BN[:, position] = choose(logits_BK, noise_BK, sampling)
        if kept_codes is not None:
            kept = kept_codes[:, position] != FREE
            codes_BN[kept, position] = kept_codes[kept, position]
    return codes_BN
