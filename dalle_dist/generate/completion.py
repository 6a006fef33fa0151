"""What a completion keeps of a given image: its first rows (paper 3.3), or what a mask shows white.

Tokens are sampled in raster order, so that a token looks at those above it and to its left alone.
Of a region that is not the top of the image, what lies below or to the right is kept as it is, but
nothing that is sampled before it knows of it.

Shape suffixes: G tokens per side, N image tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_dist import storage
from dalle_dist.data.augment import centre
from dalle_dist.data.decode import decode, on_white
from dalle_dist.errors import DataError, UserError
from dalle_dist.generate.request import Kept
from dalle_dist.generate.sampler import FREE
from dalle_dist.image_tokenizer.protocol import ImageTokenizer


def kept_rows(tokenizer: ImageTokenizer, image: Image.Image, rows: int) -> Kept:
    """The first rows of tokens. Raises UserError: not fewer rows than the image has."""
    return kept_tokens(tokenizer, image, first_rows(tokenizer, rows))


def kept_region(tokenizer: ImageTokenizer, image: Image.Image, mask: Image.Image) -> Kept:
    """The tokens whose pixels are all white in `mask`, an image of the same proportions.

    Raises:
        UserError: other proportions, or all or none of the tokens are kept.
    """
    return kept_tokens(tokenizer, image, white_tokens(tokenizer, image.size, mask))


def kept_tokens(tokenizer: ImageTokenizer, image: Image.Image, keep_GG: Tensor) -> Kept:
    """The tokens of an image's centred square that are True in `keep_GG`."""
    pixels_HWC = torch.from_numpy(np.array(centre(on_white(image), tokenizer.image_size)))
    codes_1N = tokenizer.encode(pixels_HWC.permute(2, 0, 1)[None].float() / 255).cpu()
    return Kept(torch.where(keep_GG.flatten(), codes_1N[0], FREE))


def first_rows(tokenizer: ImageTokenizer, rows: int) -> Tensor:
    """keep_GG of `kept_rows`, and its error; the image is not needed."""
    if not 0 < rows < tokenizer.grid:
        raise UserError(f"--rows: {rows} is not in 1 to {tokenizer.grid - 1}")
    keep_GG = torch.zeros(tokenizer.grid, tokenizer.grid, dtype=torch.bool)
    keep_GG[:rows] = True
    return keep_GG


def white_tokens(tokenizer: ImageTokenizer, size: tuple[int, int], mask: Image.Image) -> Tensor:
    """keep_GG of `kept_region` for an image of `size` (width, height), and its errors."""
    (width, height), (across, down) = size, mask.size
    # A mask's side may be rounded to whole pixels.
    if abs(width * down - height * across) > max(width, height):
        raise UserError(
            f"--keep-mask: {across} x {down} pixels have not the proportions of the image, "
            f"{width} x {height}"
        )
    white = torch.from_numpy(np.array(_square(mask, tokenizer.image_size)) == 255)
    cells = white.unflatten(0, (tokenizer.grid, -1)).unflatten(2, (tokenizer.grid, -1))
    keep_GG = cells.all(dim=3).all(dim=1)
    if keep_GG.all() or not keep_GG.any():
        what = "all" if keep_GG.all() else "none"
        raise UserError(
            f"--keep-mask: keeps {what} of the {tokenizer.grid} x {tokenizer.grid} tokens; white "
            "is kept, black is to be generated"
        )
    return keep_GG


def read_image(path: str) -> Image.Image:
    """An image file, local or remote, upright and in RGB. Raises DataError: none, or damaged."""
    image = decode(storage.read_bytes(path))
    if image is None:
        raise DataError(f"{path}: not an image that can be decoded")
    return image


def _square(mask: Image.Image, size: int) -> Image.Image:
    """The part of a mask that belongs to the image's square; 255 where all of a pixel is white."""
    black_or_white = mask.convert("L").point(lambda value: 255 * (value >= 128))
    square = centre(black_or_white, min(mask.size))
    filter_ = Image.Resampling.NEAREST if square.width < size else Image.Resampling.BOX
    return square.resize((size, size), filter_)
