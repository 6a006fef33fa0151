"""DALLE-pytorch's DiscreteVAE as an image tokenizer; its weights have the names they have there.

Shape suffixes: B batch, C colour channels, H and W pixels, G codes per side, F feature channels,
K codebook entries.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from dalle_dist.checkpoint.formats import State
from dalle_dist.errors import CheckpointError
from dalle_dist.interop.imported import ImportedTokenizer
from dalle_dist.interop.saved_tokenizer import SavedTokenizer

# The program's defaults, where a file of an older version has no such key.
HPARAMS: dict[str, int] = {
    "image_size": 256,
    "num_layers": 3,
    "num_tokens": 512,
    "channels": 3,
    "codebook_dim": 512,
    "hidden_dim": 64,
    "num_resnet_blocks": 0,
}
_MIDDLE = 0.5  # mean and deviation by which it norms each channel


class Residual(nn.Module):
    """x + three convolutions of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x_BFGG: Tensor) -> Tensor:
        return x_BFGG + self.net(x_BFGG)


class DiscreteVAE(nn.Module):
    """Images to logits over the codebook, embedded codes to images."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width, layers, blocks = shape["hidden_dim"], shape["num_layers"], shape["num_resnet_blocks"]
        codes, channels, embedded = shape["num_tokens"], shape["channels"], shape["codebook_dim"]
        self.codebook = nn.Embedding(codes, embedded)
        inputs = [channels, *[width] * (layers - 1)]
        self.encoder = nn.Sequential(
            *(_halved(n, width) for n in inputs),
            *(Residual(width) for _ in range(blocks)),
            nn.Conv2d(width, codes, 1),
        )
        # Without residual blocks the codes' embeddings go into the first doubling as they are.
        stem = [nn.Conv2d(embedded, width, 1)] if blocks else []
        inputs = [width if blocks else embedded, *[width] * (layers - 1)]
        self.decoder = nn.Sequential(
            *stem,
            *(Residual(width) for _ in range(blocks)),
            *(_doubled(n, width) for n in inputs),
            nn.Conv2d(width, channels, 1),
        )

    def encode_logits(self, images_BCHW: Tensor) -> Tensor:
        """logits_BKGG of images in [0, 1]."""
        logits_BKGG: Tensor = self.encoder((images_BCHW - _MIDDLE) / _MIDDLE)
        return logits_BKGG

    def decode_normed(self, codes_BGG: Tensor) -> Tensor:
        """images_BCHW as the program has them: in [-1, 1], and beyond."""
        images_BCHW: Tensor = self.decoder(self.codebook(codes_BGG).permute(0, 3, 1, 2))
        return images_BCHW


class DiscreteVAETokenizer(SavedTokenizer):
    """`shape` has the keys of `HPARAMS`, and `grid` and `codebook_size` that follow from them."""

    kind: ClassVar[str] = "dalle-pytorch"

    @staticmethod
    def build(shape: dict[str, Any]) -> nn.Module:
        return DiscreteVAE(shape)

    def codes(self, images_BCHW: Tensor) -> Tensor:
        assert isinstance(self.model, DiscreteVAE)
        return self.model.encode_logits(images_BCHW).argmax(dim=1)

    def images(self, codes_BGG: Tensor) -> Tensor:
        assert isinstance(self.model, DiscreteVAE)
        return (self.model.decode_normed(codes_BGG) * _MIDDLE + _MIDDLE).clamp(0, 1)


def imported_vae(hparams: dict[str, Any], weights: State) -> ImportedTokenizer:
    """Of a file's own hyper-parameters and weights. Raises CheckpointError: of another shape."""
    found = {key: hparams.get(key, default) for key, default in HPARAMS.items()}
    for key, value in found.items():
        least = 0 if key == "num_resnet_blocks" else 1
        if type(value) is not int or not least <= value <= 1 << 20:
            raise CheckpointError(f"DiscreteVAE: its {key} is {value!r}")
    if found["channels"] != 3:
        raise CheckpointError(f"DiscreteVAE: {found['channels']} channels, but images here have 3")
    grid = found["image_size"] >> found["num_layers"]
    shape = {**found, "grid": grid, "codebook_size": found["num_tokens"]}
    return ImportedTokenizer(shape, {name: x.float() for name, x in weights.items()})


def _halved(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, width, 4, stride=2, padding=1), nn.ReLU())


def _doubled(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(inputs, width, 4, stride=2, padding=1), nn.ReLU())
