"""Attention of one new image token per sample, and a cache that keeps what its mask still needs.

Text keys and values are kept once per caption, and all its samples look at them in one product
(`caption_text.py`). Image keys and values go into a ring of `span(mask).slots`, where scan position
p is in slot p % slots; masks by column keep whole columns, each of them contiguous.

Shape suffixes: C captions, B samples of all captions, H heads, D head width, T text tokens,
J slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dalle_kernels.masks import AttentionMask
from dalle_kernels.spans import span
from dalle_kernels.sparse_attention.api import unfit, warn
from dalle_kernels.sparse_attention.caption_text import CaptionCache


class DecodeCache(CaptionCache):
    """One layer's keys and values while images are generated token by token, all at one position.

    Arguments and errors are those of `CaptionCache`.
    """

    def __init__(self, mask: AttentionMask, samples: Sequence[int]) -> None:
        super().__init__(mask, samples)
        self.slots = self.span.slots

    def slot(self, position: int) -> int:
        return self.mask.scan(position) % self.slots

    def extend(
        self,
        position: int | Tensor,
        q_B1HD: Tensor,
        k_B1HD: Tensor,
        v_B1HD: Tensor,
        backend: str = "auto",
    ) -> Tensor:
        """out_B1HD of every sample's image token at raster position `position`.

        Its key and value are put into the cache before. Positions come in order.

        Args:
            position: also an int64 tensor of no dimension, so that a CUDA graph of the call
                serves all positions; nobody looks whether that is in the image.
            backend: "torch" (any device), "triton", or "auto": Triton on GPUs that run it; on
                others torch, after one warning.

        Raises:
            ValueError: naming the argument that does not fit.
        """
        if backend not in ("auto", "torch", "triton"):
            raise ValueError(f"backend: {backend!r} is not one of auto, torch, triton")
        self._check(position, q=q_B1HD, k=k_B1HD, v=v_B1HD)
        new = (q_B1HD[:, 0], k_B1HD[:, 0], v_B1HD[:, 0])
        if self._takes_triton(q_B1HD, backend):
            from dalle_kernels.sparse_attention.triton_decode import extend

            if isinstance(position, int):
                position = _positions(self.mask.image, q_B1HD.device)[position]
            out_BHD = extend(position, *new, self._kept, self.first_C, self.samples, self.mask)
            return out_BHD[:, None]
        return self._extend(int(position), *new)[:, None]

    def takes_tensors(self) -> bool:
        """Whether `extend` takes the position as a tensor without waiting for the device."""
        self._check_text()
        return self._takes_triton(self.k_BHJD, "auto")

    def _check(self, position: int | Tensor, **new: Tensor) -> None:
        self._check_text()
        if isinstance(position, int) and not 0 <= position < self.mask.image:
            raise ValueError(f"position: {position} is not in 0 to {self.mask.image - 1}")
        samples, heads, _, width = self.k_BHJD.shape
        for name, x_B1HD in new.items():
            if x_B1HD.shape != (samples, 1, heads, width):
                raise ValueError(
                    f"{name}: shape {tuple(x_B1HD.shape)} is not {(samples, 1, heads, width)}"
                )

    def _takes_triton(self, x_D: Tensor, backend: str) -> bool:
        if backend == "torch" or (backend == "auto" and x_D.device.type == "cpu"):
            return False
        missing = unfit(x_D)
        if missing and backend == "triton":
            raise ValueError(f"backend: 'triton' cannot run here: {missing}")
        if missing:
            warn("decoding falls back to torch", missing)
        return missing is None

    def filled(self, position: int) -> tuple[int, int]:
        """First and last + 1 of the slots that the token at raster position `position` may use."""
        scan = self.mask.scan(position)
        if self.span.same_line:  # a line starts at a multiple of the slots, or all lines are kept
            return self.span.first_key(scan) % self.slots, scan % self.slots + 1
        return 0, min(scan + 1, self.slots)

    def _extend(self, position: int, q_BHD: Tensor, k_BHD: Tensor, v_BHD: Tensor) -> Tensor:
        slot = self.slot(position)
        self.k_BHJD[:, :, slot], self.v_BHJD[:, :, slot] = k_BHD, v_BHD
        # Scores and their softmax in fp32 at least, as in the fused kernels.
        exact = torch.promote_types(q_BHD.dtype, torch.float32)
        q_BHD = q_BHD.to(exact) * (1 / math.sqrt(q_BHD.shape[-1]))
        start, stop = self.filled(position)
        k_BHJD, v_BHJD = (x[:, :, start:stop].to(exact) for x in (self.k_BHJD, self.v_BHJD))
        image_BHJ = (q_BHD[:, :, None] @ k_BHJD.transpose(-1, -2))[:, :, 0]
        if not self.span.full:
            image_BHJ += _bias(self.mask, q_BHD.device)[self.mask.scan(position), start:stop]
        text_BHT = self._per_caption(q_BHD, self.k_CHTD.to(exact).transpose(-1, -2))
        weights = torch.cat([text_BHT, image_BHJ], dim=-1).softmax(dim=-1)
        text_BHT, image_BHJ = weights.split([self.mask.text, stop - start], dim=-1)
        out_BHD = self._per_caption(text_BHT, self.v_CHTD.to(exact))
        return (out_BHD + (image_BHJ[:, :, None] @ v_BHJD)[:, :, 0]).to(self.v_BHJD.dtype)


# Kept for later calls, so never inference tensors, which autograd would refuse.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _positions(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _bias(mask: AttentionMask, device: torch.device) -> Tensor:
    """[scan position, slot]: 0 where the slot holds a token that may be looked at, else -inf."""
    slots, scan = span(mask).slots, torch.arange(mask.image, device="cpu")
    query, key = mask.visible(scan[:, None], scan[None, :]).nonzero().unbind(1)
    bias = torch.full((mask.image, slots), -torch.inf, device="cpu", dtype=torch.float32)
    bias[query, key % slots] = 0
    return bias.to(device)
