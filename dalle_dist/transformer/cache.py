"""Keys and values of earlier states, kept while a picture is drawn token by token.

Shape suffixes: B batch, H heads, D head width, T text states, N image states, J keys looked at.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values: the text's once, image states as they come."""

    def __init__(self, image_states: int) -> None:
        self.image_states = image_states

    def put_text(self, k_BHTD: Tensor, v_BHTD: Tensor) -> None:
        self.k_BHTD, self.v_BHTD = k_BHTD.contiguous(), v_BHTD.contiguous()
        batch, heads, _, width = k_BHTD.shape
        # State-major, so that the keys a step gathers are long runs of memory.
        self.k_NBHD = k_BHTD.new_empty(self.image_states, batch, heads, width)
        self.v_NBHD = torch.empty_like(self.k_NBHD)

    def put_image(self, state: int, k_BHD: Tensor, v_BHD: Tensor) -> None:
        self.k_NBHD[state], self.v_NBHD[state] = k_BHD, v_BHD

    def attend(self, q_BHD: Tensor, keys_J: Tensor) -> Tensor:
        """One query per sample over all text and the given image states: out_BHD."""
        k_BHJD, v_BHJD = (x[keys_J].permute(1, 2, 0, 3) for x in (self.k_NBHD, self.v_NBHD))
        q_BH1D = (q_BHD / math.sqrt(q_BHD.shape[-1]))[:, :, None]
        scores = (q_BH1D @ k.transpose(-1, -2) for k in (self.k_BHTD, k_BHJD))
        weights = torch.cat(list(scores), dim=-1).float().softmax(dim=-1).to(q_BHD.dtype)
        text, image = weights.split([self.k_BHTD.shape[2], len(keys_J)], dim=-1)
        return (text @ self.v_BHTD + image @ v_BHJD)[:, :, 0]
