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

    def extend(self, position: int, q_B1HD: Tensor, k_B1HD: Tensor, v_B1HD: Tensor) -> Tensor:
        """out_B1HD of the image token at raster position `position`, after it is put there."""
        self.put_image(position, k_B1HD[:, 0], v_B1HD[:, 0])
        return self.attend(q_B1HD[:, 0], position)[:, None]

    def put_image(self, position: int, k_BHD: Tensor, v_BHD: Tensor) -> None:
        """Key and value of the image token at raster position `position` of every sample.

        Positions come in order, from 0 on.
        """
        self._check(position, k=k_BHD, v=v_BHD)
        slot = self.slot(position)
        self.k_BHJD[:, :, slot], self.v_BHJD[:, :, slot] = k_BHD, v_BHD

    def attend(self, q_BHD: Tensor, position: int, backend: str = "auto") -> Tensor:
        """out_BHD of the image token at raster position `position`, which `put_image` has had.

        backend: "torch" (any device), "triton", or "auto": Triton on GPUs that run it; on others
            torch, after one warning.

        Raises:
            ValueError: naming the argument that does not fit.
        """
        if backend not in ("auto", "torch", "triton"):
            raise ValueError(f"backend: {backend!r} is not one of auto, torch, triton")
        self._check(position, q=q_BHD)
        if self._takes_triton(q_BHD, backend):
            from dalle_kernels.sparse_attention.triton_decode import attend

            return attend(
                q_BHD, self._kept, self.first_C, self.samples, self.mask,
                self.mask.scan(position), self.filled(position),
            )  # fmt: skip
        return self._attend(q_BHD, position)

    def _check(self, position: int, **new: Tensor) -> None:
        self._check_text()
        if not 0 <= position < self.mask.image:
            raise ValueError(f"position: {position} is not in 0 to {self.mask.image - 1}")
        expected = (*self.k_BHJD.shape[:2], self.k_BHJD.shape[-1])
        for name, x_BHD in new.items():
            if x_BHD.shape != expected:
                raise ValueError(f"{name}: shape {tuple(x_BHD.shape)} is not {expected}")

    def _takes_triton(self, q_BHD: Tensor, backend: str) -> bool:
        if backend == "torch" or (backend == "auto" and q_BHD.device.type == "cpu"):
            return False
        missing = unfit(q_BHD)
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

    def _attend(self, q_BHD: Tensor, position: int) -> Tensor:
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


# Kept for later calls, so never an inference tensor, which autograd would refuse.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _bias(mask: AttentionMask, device: torch.device) -> Tensor:
    """[scan position, slot]: 0 where the slot holds a token that may be looked at, else -inf."""
    slots, scan = span(mask).slots, torch.arange(mask.image, device="cpu")
    query, key = mask.visible(scan[:, None], scan[None, :]).nonzero().unbind(1)
    bias = torch.full((mask.image, slots), -torch.inf, device="cpu", dtype=torch.float32)
    bias[query, key % slots] = 0
    return bias.to(device)
