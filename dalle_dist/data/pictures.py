"""Tensors to pictures, and pictures to grids."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

GAP = 6  # pixels between pictures


def to_image(picture_CHW: Tensor) -> Image.Image:
    """Floats in [0, 1] (clamped) to an RGB picture."""
    pixels_HWC = (picture_CHW.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels_HWC.cpu().numpy())


def grid(rows: Sequence[Sequence[Image.Image]], cell: int = 96) -> Image.Image:
    """Rows of pictures, each fitted into a square of `cell` pixels, on white."""
    width = max(len(row) for row in rows)
    canvas = Image.new("RGB", (width * (cell + GAP) + GAP, len(rows) * (cell + GAP) + GAP), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            canvas.paste(fit(picture, cell), (GAP + j * (cell + GAP), GAP + i * (cell + GAP)))
    return canvas


def fit(picture: Image.Image, cell: int) -> Image.Image:
    return picture.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC)
