"""Attention of one new image state per sample, and a cache that keeps what its mask still needs.

Text keys and values are kept once per caption, and all its samples look at them in one product.
Image keys and values go into a ring of `span(mask).slots`; column masks keep whole columns, each of
them contiguous, since a column's states come a line apart.

Shape suffixes: C captions, S samples of a caption (padded to the most), B samples of all captions,
H heads, D head width, T text states, J slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from dalle_kernels.masks import AttentionMask
from dalle_kernels.spans import span
from dalle_kernels.sparse_attention.api import unfit, warn


class DecodeCache:
    """One layer's keys and values while images are drawn state by state.

    Args:
        mask: the layer's.
        samples: how many images are drawn from each caption; images of a caption are neighbours
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
        self.slots = mask.image if mask.kind == "column" else self.span.slots

    def put_text(self, k_CHTD: Tensor, v_CHTD: Tensor) -> None:
        """Keys and values of each caption's text states; makes room for the images."""
        if k_CHTD.ndim != 4 or k_CHTD.shape != v_CHTD.shape:
            raise ValueError(
                f"k, v: shapes {tuple(k_CHTD.shape)} and {tuple(v_CHTD.shape)} are not one "
                "[C, H, T, D]"
            )
        captions, heads, text, width = k_CHTD.shape
        if (captions, text) != (len(self.samples), self.mask.text):
            raise ValueError(
                f"text: {captions} captions of {text} states, expected {len(self.samples)} of "
                f"{self.mask.text}"
            )
        self.k_CHTD, self.v_CHTD = k_CHTD.contiguous(), v_CHTD.contiguous()
        self.k_BHJD = k_CHTD.new_empty(sum(self.samples), heads, self.slots, width)
        self.v_BHJD = torch.empty_like(self.k_BHJD)
        self.place_B = _places(self.samples, k_CHTD.device)
        first = [0, *accumulate(self.samples)]  # sample of each caption, and one past the last
        self.first_C = torch.tensor(first, device=k_CHTD.device)

    def put_image(self, state: int, k_BHD: Tensor, v_BHD: Tensor) -> None:
        """Key and value of image state `state` of every sample; states come in order."""
        self._check(state, k=k_BHD, v=v_BHD)
        slot = self.span.position(state) % self.slots
        self.k_BHJD[:, :, slot], self.v_BHJD[:, :, slot] = k_BHD, v_BHD

    def attend(self, q_BHD: Tensor, state: int, backend: str = "auto") -> Tensor:
        """out_BHD of image state `state`, whose key and value are there already.

        backend: "torch" (any device), "triton", or "auto": Triton on GPUs that run it; on others
            torch, after one warning.

        Raises:
            ValueError: naming the argument that does not fit.
        """
        if backend not in ("auto", "torch", "triton"):
            raise ValueError(f"backend: {backend!r} is not one of auto, torch, triton")
        self._check(state, q=q_BHD)
        if self._takes_triton(q_BHD, backend):
            from dalle_kernels.sparse_attention.triton_decode import attend

            return attend(q_BHD, self, state)
        return self._attend(q_BHD, state)

    def _check(self, state: int, **new: Tensor) -> None:
        if "k_BHJD" not in vars(self):
            raise ValueError("text: none is there; put_text comes first")
        if not 0 <= state < self.mask.image:
            raise ValueError(f"state: {state} is not in 0 to {self.mask.image - 1}")
        room = (*self.k_BHJD.shape[:2], self.k_BHJD.shape[-1])
        for name, x_BHD in new.items():
            if x_BHD.shape != room:
                raise ValueError(f"{name}: shape {tuple(x_BHD.shape)} is not {room}")

    def _takes_triton(self, q_BHD: Tensor, backend: str) -> bool:
        if backend == "torch" or (backend == "auto" and q_BHD.device.type == "cpu"):
            return False
        missing = unfit(q_BHD)
        if missing and backend == "triton":
            raise ValueError(f"backend: 'triton' cannot run here: {missing}")
        if missing:
            warn("decoding falls back to torch", missing)
        return missing is None

    def filled(self, state: int) -> tuple[int, int]:
        """First and last + 1 of the slots that state `state` may look at."""
        position, grid = self.span.position(state), self.span.grid
        if self.mask.kind == "column":
            return position // grid * grid, position + 1
        return 0, position % grid + 1 if self.span.own_line else min(position + 1, self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        kept = (self.k_CHTD, self.v_CHTD, self.k_BHJD, self.v_BHJD)
        return sum(x.numel() * x.element_size() for x in kept)

    def _attend(self, q_BHD: Tensor, state: int) -> Tensor:
        # Scores and their softmax in fp32 at least, as in the fused kernels.
        exact = torch.promote_types(q_BHD.dtype, torch.float32)
        q_BHD = q_BHD.to(exact) * (1 / math.sqrt(q_BHD.shape[-1]))
        start, stop = self.filled(state)
        k_BHJD, v_BHJD = (x[:, :, start:stop].to(exact) for x in (self.k_BHJD, self.v_BHJD))
        near_BHJ = (q_BHD[:, :, None] @ k_BHJD.transpose(-1, -2))[:, :, 0]
        if self.mask.kind == "conv":
            near_BHJ += _bias(self.mask, q_BHD.device)[state, :stop]
        far_BHT = self._per_caption(q_BHD, self.k_CHTD.to(exact).transpose(-1, -2))
        weights = torch.cat([far_BHT, near_BHJ], dim=-1).softmax(dim=-1)
        far_BHT, near_BHJ = weights.split([self.mask.text, stop - start], dim=-1)
        far_BHD = self._per_caption(far_BHT, self.v_CHTD.to(exact))
        return (far_BHD + (near_BHJ[:, :, None] @ v_BHJD)[:, :, 0]).to(self.v_BHJD.dtype)

    def _per_caption(self, x_BHn: Tensor, y_CHnm: Tensor) -> Tensor:
        """Each sample's rows times its caption's matrix: [B, H, m]."""
        captions, most = len(self.samples), max(self.samples)
        if self.place_B is not None:
            padded = x_BHn.new_zeros(captions * most, *x_BHn.shape[1:])
            x_BHn = padded.index_copy(0, self.place_B, x_BHn)
        x_CHSn = x_BHn.unflatten(0, (captions, most)).transpose(1, 2)
        out_BHm = (x_CHSn @ y_CHnm).transpose(1, 2).flatten(0, 1)
        return out_BHm if self.place_B is None else out_BHm[self.place_B]


def _places(samples: tuple[int, ...], device: torch.device) -> Tensor | None:
    """int64 [B]: each sample's row among captions padded to the most samples; None if all alike."""
    most = max(samples)
    if min(samples) == most:
        return None
    rows = [c * most + s for c, count in enumerate(samples) for s in range(count)]
    return torch.tensor(rows, device=device)


# Kept for later calls, so never an inference tensor, which autograd would refuse.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _bias(mask: AttentionMask, device: torch.device) -> Tensor:
    """[state, slot]: 0 where the ring's slot holds a state to be looked at, else -inf."""
    slots, part = span(mask).slots, mask.image_part()
    state, key = part.nonzero().unbind(1)
    bias = torch.full((mask.image, slots), -torch.inf, device="cpu", dtype=torch.float32)
    bias[state, key % slots] = 0
    return bias.to(device)
