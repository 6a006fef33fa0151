"""The other side of the benchmarks: a plain dense-causal model, and DALLE-pytorch.

Shape suffixes: B batch, T text, N image, S = T + N positions, W width, H heads, D head width.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_dist.config import Config


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP as one writes them first, dense causal attention by torch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BSW: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x_BSW)).unflatten(-1, (3, self.heads, -1))
        q_BHSD, k_BHSD, v_BHSD = qkv.permute(2, 0, 3, 1, 4)
        a_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, is_causal=True)
        x_BSW = x_BSW + self.out(a_BHSD.transpose(1, 2).flatten(2))
        return x_BSW + self.mlp(self.norm2(x_BSW))


class PlainTransformer(nn.Module):
    """Our sequence layout and separate unembeddings on dense causal layers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        shape, width = config.transformer, config.transformer.width
        self.text_tokens = shape.text_tokens
        self.text = nn.Embedding(config.tokenizer.vocab_size, width)
        self.image = nn.Embedding(config.transformer.codebook_size + 1, width)
        self.position = nn.Parameter(torch.randn(shape.tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(PlainBlock(width, shape.heads) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(width)
        self.text_head = nn.Linear(width, config.tokenizer.vocab_size)
        self.image_head = nn.Linear(width, config.transformer.codebook_size)

    def forward(self, text_BT: Tensor, codes_BN: Tensor) -> Tensor:
        """The mean loss, an eighth of it text."""
        x_BSW = self.features(text_BT, codes_BN[:, :-1])
        text_logits = self.text_head(x_BSW[:, : self.text_tokens])
        image_logits = self.image_head(x_BSW[:, self.text_tokens :])
        text = F.cross_entropy(text_logits.flatten(0, 1), text_BT.flatten())
        image = F.cross_entropy(image_logits.flatten(0, 1), codes_BN.flatten())
        return text / 8 + image * 7 / 8

    def next_logits(self, text_BT: Tensor, codes_Bn: Tensor) -> Tensor:
        """Logits of the code after `codes_Bn`, all positions computed anew."""
        return self.image_head(self.features(text_BT, codes_Bn)[:, -1])

    def features(self, text_BT: Tensor, codes_Bn: Tensor) -> Tensor:
        start_B1 = torch.ones_like(text_BT[:, :1])
        text_BTW = self.text(torch.cat([start_B1, text_BT[:, :-1]], dim=1))
        start_B1 = torch.full_like(start_B1, self.image.num_embeddings - 1)
        x_BSW = torch.cat([text_BTW, self.image(torch.cat([start_B1, codes_Bn], dim=1))], dim=1)
        return self.norm(self.blocks(x_BSW + self.position[: x_BSW.shape[1]]))


def trainer(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """One training step: forward, backward, optimizer."""

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


DATA_LIBRARIES = (
    "youtokentome",
    "ftfy",
    "omegaconf",
    "taming",
    "taming.models",
    "taming.models.vqgan",
    "torchvision",
    "torchvision.transforms",
    "pkg_resources",
)


def dalle_pytorch(config: Config, attention: tuple[str, ...]) -> nn.Module | None:
    """DALLE-pytorch's model of the same shape, or None where it is not installed.

    None too for images whose side is no power of two, which it does not take. Its tokenizers and
    VQGAN are not used: where their packages are absent (youtokentome does not install any more),
    stand-ins satisfy its imports.
    """
    side = config.dvae.image_size
    if importlib.util.find_spec("dalle_pytorch") is None or side & (side - 1):
        return None
    absent = {name: mock.MagicMock() for name in DATA_LIBRARIES if not _importable(name)}
    with mock.patch.dict(sys.modules, absent):
        package: Any = importlib.import_module("dalle_pytorch")
    shape, codes = config.transformer, config.dvae
    vae = package.DiscreteVAE(
        image_size=codes.image_size,
        num_tokens=codes.codebook_size,
        num_layers=codes.downsamplings,
        codebook_dim=16,
        hidden_dim=8,
    )
    return package.DALLE(
        dim=shape.width,
        vae=vae,
        num_text_tokens=config.tokenizer.vocab_size,
        text_seq_len=shape.text_tokens,
        depth=shape.layers,
        heads=shape.heads,
        dim_head=shape.width // shape.heads,
        attn_types=attention,
    )


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
