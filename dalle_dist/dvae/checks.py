"""Is this what the dVAE takes? Each check raises ValueError: what is wrong, and the fix.

Shape suffixes as in `dalle_dist.dvae.model`.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-4  # by which a resized image may leave [0, 1]


def images_fit(images_BCHW: Tensor, downsamplings: int) -> None:
    """By shape and dtype alone: no device has to be waited for."""
    if not isinstance(images_BCHW, Tensor):
        raise ValueError(f"images: {type(images_BCHW).__name__} is not a tensor")
    shape, least = tuple(images_BCHW.shape), 2**downsamplings
    if not images_BCHW.is_floating_point():
        fix = "divide by 255: images.float() / 255"
        raise ValueError(f"images: dtype {images_BCHW.dtype} is not floating; {fix}")
    if images_BCHW.dtype == torch.float64:
        raise ValueError("images: dtype torch.float64 is not the weights'; use images.float()")
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"images: shape {shape} is not [B, 3, H, W]; {_fix(shape)}")
    if any(side < 1 or side % least for side in shape[2:]):
        raise ValueError(
            f"images: height {shape[2]} and width {shape[3]} are not both multiples of {least}; "
            f"resize or crop"
        )


def values_fit(images_BCHW: Tensor) -> None:
    """All in [0, 1]; waits for the device."""
    if not images_BCHW.numel():
        return
    least, most = torch.stack(images_BCHW.aminmax()).tolist()
    if not (least >= -ROUNDING and most <= 1 + ROUNDING):  # NaN too
        fix = "divide by 255" if least >= 0 and 2 < most <= 255 else "map them to that range"
        raise ValueError(f"images: values from {least:g} to {most:g} are not in [0, 1]; {fix}")


def codes_fit(codes_BGG: Tensor, codebook_size: int) -> None:
    """int64 [B, height, width], all in the codebook; waits for the device."""
    if not isinstance(codes_BGG, Tensor):
        raise ValueError(f"codes: {type(codes_BGG).__name__} is not a tensor")
    if codes_BGG.dtype != torch.int64:
        raise ValueError(f"codes: dtype {codes_BGG.dtype} is not int64; use codes.long()")
    shape = tuple(codes_BGG.shape)
    if len(shape) != 3 or 0 in shape[1:]:
        fix = "unflatten the sequence: codes.unflatten(1, (grid, grid))"
        raise ValueError(f"codes: shape {shape} is not [B, height, width]; {fix}")
    if codes_BGG.numel():
        least, most = torch.stack(codes_BGG.aminmax()).tolist()
        if least < 0 or most >= codebook_size:
            raise ValueError(
                f"codes: values from {least} to {most} are not in 0 to {codebook_size - 1}, this "
                "dVAE's codebook; they are another dVAE's"
            )


def _fix(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        return "add the batch: images[None]"
    if len(shape) == 4 and shape[-1] == 3:
        return "put the channels first: images.permute(0, 3, 1, 2)"
    return "three channels, red, green, blue, before height and width"
