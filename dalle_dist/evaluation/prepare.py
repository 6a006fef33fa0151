"""From images of any size to the size that is evaluated, the same for reference and generated ones.

A FID changes by whole units with the filter that images were resized by (arXiv 2104.11222), so the
preparation is part of a figure, and stands in its JSON form beside it.

Shape suffixes: B batch, C colour channels, H and W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_dist.data.decode import on_white
from dalle_dist.errors import ConfigError

# Pillow's, which all average over the pixels that they leave out when they make an image smaller.
FILTERS = ("box", "bilinear", "hamming", "bicubic", "lanczos")
CROPS = ("centre", "none")


@dataclass(frozen=True)
class Preparation:
    """How an image becomes `size` x `size` pixels.

    crop     centre: the centred square of the shorter side; none: stretched
    filter   of Pillow's resize, one of FILTERS; an image that has the size is left as it is

    Raises ConfigError: a value that is not among these.
    """

    size: int = 256
    crop: str = "centre"
    filter: str = "bicubic"

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ConfigError(f"size={self.size}: a number of pixels, at least 1")
        for name, value, allowed in (
            ("crop", self.crop, CROPS),
            ("filter", self.filter, FILTERS),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}={value}: one of {', '.join(allowed)}")

    def __call__(self, image: Image.Image) -> Image.Image:
        """In RGB, on white where it was transparent."""
        image = on_white(image)
        if self.crop == "centre":
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            # Not as `box` of `resize`, whose filter would let pixels outside the square in.
            image = image.crop((left, top, left + side, top + side))
        return image.resize((self.size, self.size), Image.Resampling[self.filter.upper()])

    def to_json(self) -> str:
        """The same text for equal preparations."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Preparation:
        """What `to_json` wrote. Raises ConfigError."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{text!r} is no preparation of images ({error})") from None


def stack(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size: images_BCHW, uint8."""
    pixels_BHWC = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).contiguous()


def unstack(images_BCHW: Tensor) -> list[Image.Image]:
    """What `stack` stacked."""
    pixels_BHWC = images_BCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(pixels_HWC) for pixels_HWC in pixels_BHWC]
