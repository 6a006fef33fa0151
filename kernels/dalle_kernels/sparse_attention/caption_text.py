"""The text's part of both decoding caches: keys and values once per caption, for all its samples.

Shape suffixes: C captions, B samples of all captions, R rows (queries of all samples), H heads,
D head width, T text tokens, J slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from dalle_kernels.masks import AttentionMask
from dalle_kernels.spans import span


class CaptionCache(ABC):
    """One layer's keys and values while images are generated; a cache adds how it takes images.

    Args:
        mask: the layer's.
        samples: how many images are generated from each caption; images of a caption are neighbours
            along B.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    slots: int  # keys and values of the image that each sample keeps

    def __init__(self, mask: AttentionMask, samples: Sequence[int]) -> None:
        if not isinstance(mask, AttentionMask):
            raise ValueError(f"mask: {type(mask).__name__} is not an AttentionMask")
        if not isinstance(samples, Sequence):
            raise ValueError(f"samples: {samples!r} is not a sequence, one number for each caption")
        if not samples or min(samples) < 1:
            raise ValueError(f"samples: {list(samples)} are not one or more for each caption")
        self.mask, self.samples, self.span = mask, tuple(samples), span(mask)

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

    def put_prefix(self, k_CHnD: Tensor, v_CHnD: Tensor) -> None:
        """Keys and values of the first n image tokens, which all samples of a caption share."""
        self._check_text()
        count = k_CHnD.shape[2]
        if not 0 <= count <= self.mask.image:
            raise ValueError(f"prefix: {count} tokens are not 0 to {self.mask.image}")
        # The last of those that fall on one slot; earlier ones nobody looks at any more.
        position = {self.slot(p): p for p in range(count)}
        slots, kept = list(position), list(position.values())
        samples_C = self.first_C.diff()
        for cache_BHJD, new_CHnD in ((self.k_BHJD, k_CHnD), (self.v_BHJD, v_CHnD)):
            cache_BHJD[:, :, slots] = new_CHnD[:, :, kept].repeat_interleave(samples_C, dim=0)

    @abstractmethod
    def slot(self, position: int) -> int:
        """Where the image token at raster position `position` is kept."""

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.numel() * x.element_size() for x in self._kept)

    @property
    def _kept(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k_CHTD, self.v_CHTD, self.k_BHJD, self.v_BHJD

    def _check_text(self) -> None:
        if "k_BHJD" not in vars(self):
            raise ValueError("text: none is there; put_text comes first")

    def _per_caption(self, x_RHn: Tensor, y_CHnm: Tensor) -> Tensor:
        """Each row times its sample's caption's matrix: [R, H, m]; as many rows for each sample."""
        # One product for neighbouring captions with equally many samples. To pad all to the most
        # is costly where one has as many as all others together, as guidance has.
        rows = len(x_RHn) // sum(self.samples)
        runs = [(len(list(run)), count * rows) for count, run in groupby(self.samples)]
        xs = x_RHn.split([captions * count for captions, count in runs])
        ys = y_CHnm.split([captions for captions, _ in runs])
        products = [
            (x_RHn.unflatten(0, run).transpose(1, 2) @ y_CHnm).transpose(1, 2).flatten(0, 1)
            for run, x_RHn, y_CHnm in zip(runs, xs, ys, strict=True)
        ]
        return torch.cat(products)
