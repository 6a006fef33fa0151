"""Is this what the transformer takes? Each check raises ValueError: what is wrong, and the fix.

Shape suffixes as in `dalle_dist.transformer.model`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_dist.config import Config


def text_fits(text_BT: Tensor, config: Config) -> None:
    """int64 [B, text_tokens]; the device is not waited for."""
    fix = "tokenizer.encode_padded(caption, text_tokens) makes a row"
    _shape_fits("text", text_BT, config.transformer.text_tokens, fix)


def codes_fit(codes_BN: Tensor, captions: int, config: Config) -> None:
    """int64 [B, image_tokens], a row per caption; the device is not waited for."""
    fix = "image_tokenizer.encode(images) makes them"
    _shape_fits("codes", codes_BN, config.transformer.image_tokens, fix)
    if len(codes_BN) != captions:
        raise ValueError(f"codes: {len(codes_BN)} rows, but text has {captions}")


def ids_fit(name: str, ids: Tensor, classes: int) -> None:
    """All in 0 to classes - 1; waits for the device."""
    if not isinstance(ids, Tensor) or not ids.numel():
        return  # the shape's check names it
    least, most = torch.stack(ids.aminmax()).tolist()
    if least < 0 or most >= classes:
        raise ValueError(f"{name}: values from {least} to {most} are not in 0 to {classes - 1}")


def _shape_fits(name: str, ids: Tensor, length: int, fix: str) -> None:
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name}: {type(ids).__name__} is not a tensor")
    if ids.dtype != torch.int64:
        raise ValueError(f"{name}: dtype {ids.dtype} is not int64; use {name}.long()")
    if ids.ndim != 2 or ids.shape[1] != length:
        raise ValueError(f"{name}: shape {tuple(ids.shape)} is not [B, {length}]; {fix}")
