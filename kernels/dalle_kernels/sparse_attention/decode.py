"""Attention of one new image token per sample, and a cache that keeps what its mask still needs.

Text keys and values are kept once per caption, and all its samples look at them in one product.
Image keys and values go into a ring of `span(mask).slots`, where scan position p is in slot
p % slots; masks by column keep whole columns, each of them contiguous.

Shape suffixes: C captions, B samples of all captions, H heads, D head width, T text tokens,
J slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, groupby

import torch
from torch import Tensor

from dalle_kernels.masks import AttentionMask
from dalle_kernels.spans import span
from dalle_kernels.sparse_attention.api import unfit, warn


class DecodeCache:
    """One layer's keys and values while images are generated token by token.

    Args:
        mask: the layer's.
        samples: how many images are generated from each caption; images of a caption are neighbours
            along B.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(self, mask: AttentionMask, samples: Sequence[int]) -> None:
        if not isinstance(mask, AttentionMask):
            raise ValueError(f"mask: {type(mask).__name__} is not an AttentionMask")
        if not isinstance(samples, Sequence):
            raise ValueError(f"samples: {samples!r} is not a sequence, one number for each caption")
        if not samples or min(samples) < 1:
            raise ValueError(f"samples: {list(samples)} are not one or more for each caption")
        self.mask, self.samples, self.span = mask, tuple(samples), span(mask)
        self.slots = self.span.slots

    def put_text(self, k_CHTD: Tensor, v_CHTD: Tensor) -> None:
        """Keys and values of each caption's text; makes room for the images."""
        if k_CHTD.ndim != 4 or k_CHTD.shape != v_CHTD.shape:
            raise ValueError(
                f"k, v: shapes {tuple(k_CHTD.shape)} and {tuple(v_CHTD.shape)} are not one "
                "[C, H, T, D]"
            )
        captions, heads, text, width = k_CHTD.shape
        if (captions, text) != (len(self.samples), self.mask.text):
            raise ValueError(
                f"text: {captions} captions of {text} tokens, expected {len(self.samples)} of "
                f"{self.mask.text}"
            )
        self.k_CHTD, self.v_CHTD = k_CHTD.contiguous(), v_CHTD.contiguous()
        self.k_BHJD = k_CHTD.new_empty(sum(self.samples), heads, self.slots, width)
        self.v_BHJD = torch.empty_like(self.k_BHJD)
        first = [0, *accumulate(self.samples)]  # sample of each caption, and one past the last
        self.first_C = torch.tensor(first, device=k_CHTD.device)

    def put_image(self, position: int, k_BHD: Tensor, v_BHD: Tensor) -> None:
        """Key and value of the image token at raster position `position` of every sample.

        Positions come in order, from 0 on.
        """
        self._check(position, k=k_BHD, v=v_BHD)
        slot = self.mask.scan(position) % self.slots
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
        if "k_BHJD" not in vars(self):
            raise ValueError("text: none is there; put_text comes first")
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

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.numel() * x.element_size() for x in self._kept)

    @property
    def _kept(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k_CHTD, self.v_CHTD, self.k_BHJD, self.v_BHJD

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

    def _per_caption(self, x_BHn: Tensor, y_CHnm: Tensor) -> Tensor:
        """Each sample's rows times its caption's matrix: [B, H, m]."""
        # One product for neighbouring captions with equally many samples. To pad all to the most
        # is costly where one has as many as all others together, as guidance has.
        runs = [(len(list(run)), count) for count, run in groupby(self.samples)]
        xs = x_BHn.split([captions * count for captions, count in runs])
        ys = y_CHnm.split([captions for captions, _ in runs])
        products = [
            (x_BHn.unflatten(0, run).transpose(1, 2) @ y_CHnm).transpose(1, 2).flatten(0, 1)
            for run, x_BHn, y_CHnm in zip(runs, xs, ys, strict=True)
        ]
        return torch.cat(products)


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
