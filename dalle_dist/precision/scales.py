"""One gradient scale per resblock, and the rule by which they change (paper 2.4 and appendix D).

Shape suffix: K resblocks, in the order of the forward pass: attention and MLP of each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

START, LOW, HIGH = 13.0, 7.0, 24.0  # log2 of the scale for one replica
GROWTH = 1 / 1000  # log2, after each step in which a block's gradients are finite
CUT = 0.5  # log2, after one in which they are not
WINDOW = 125  # steps in which a scale is divided at most once


class BlockScales:
    """The scales of all resblocks, the same on every rank; they change between steps only.

    Kept as binary logarithms in double precision, so that a million small steps lose nothing and
    a saved run goes on bit for bit; and as those of one replica, so that it may go on with another
    number of them.
    """

    def __init__(self, blocks: int, replicas: int, device: torch.device | str = "cpu") -> None:
        self._replicas = replicas  # the loss is divided by the batch of all of them
        self._logs = [START] * blocks
        self._since_cut = [WINDOW] * blocks  # steps; a first overflow divides at once
        self.overflows = [0] * blocks
        self.scale_K = torch.empty(blocks, device=device)
        self._publish()

    def __len__(self) -> int:
        return len(self._logs)

    @property
    def values(self) -> list[float]:
        """As numbers; exactly those of `scale_K`."""
        return [float(scale) for scale in self.scale_K.tolist()]

    def update(self, bad_K: Sequence[bool]) -> None:
        """Take note of a step; `bad_K`: whose parameter gradients are not finite on some rank.

        A bad block's scale is divided by sqrt(2), unless it was within the last 125 steps; the
        others grow, also when the step is skipped.
        """
        for block, bad in enumerate(bad_K):
            log, self._since_cut[block] = self._logs[block], self._since_cut[block] + 1
            if not bad:
                log += GROWTH
            elif self._since_cut[block] > WINDOW:
                log, self._since_cut[block] = log - CUT, 0
            self.overflows[block] += bad
            self._logs[block] = min(max(log, LOW), HIGH)
        self._publish()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "log2": list(self._logs),
            "since_cut": list(self._since_cut),
            "overflows": list(self.overflows),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._logs, self._since_cut = list(state["log2"]), list(state["since_cut"])
        self.overflows = list(state["overflows"])
        self._publish()

    def _publish(self) -> None:
        one_K = torch.tensor(self._logs, dtype=torch.float64).exp2()
        self.scale_K.copy_(self._replicas * one_K, non_blocking=True)


class BlockScale:
    """One block's scale, as the block uses it: a view that follows every change."""

    def __init__(self, scales: BlockScales, block: int, dtype: torch.dtype) -> None:
        self.scale: Tensor = scales.scale_K[block]
        self.dtype = dtype
