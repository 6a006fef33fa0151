"""The gradients of fp16 training on their way to the optimizer: found finite, brought to one scale.

Shape suffix: K resblocks; where one more is meant, K1, the last stands for all other parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dalle_dist.distributed.launch import Ranks
from dalle_dist.optim.ema import Fragment
from dalle_dist.precision.scales import BlockScales
from dalle_dist.transformer.blocks import attach_scales, block_of, resblocks


class BlockScaling:
    """The scales of a model's resblocks, and what happens to its gradients because of them.

    `matrices` names the parameters whose gradients travel in fp16; all others stay fp32.

    Args:
        dtype: what the blocks compute in; fp32 is for tests.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, dtype: torch.dtype = torch.float16) -> None:
        blocks = resblocks(model)
        self._ranks, self._block = ranks, block_of(model)
        self.scales = BlockScales(len(blocks), ranks.world, ranks.device)
        attach_scales(model, self.scales, dtype)
        self.matrices = frozenset(
            f"{name}.{own}" for name, b in blocks for own, p in b.named_parameters() if p.ndim == 2
        )
        self._other_overflows = 0  # updates in which what is in no block was not finite
        self._underflow_K: list[float] = []
        self._norms_K: list[float] = []

    def unscale(self, gradients: list[Fragment], measure: bool = False) -> frozenset[int | None]:
        """Sums over ranks and true units in place of scaled means over ranks; then new scales.

        `measure` counts underflow, at the cost of another pass over the gradients, and forgets the
        norms of the last update.

        Returns:
            The blocks whose gradients are not finite on some rank (None: what is in no block); they
            are zero afterwards.
        """
        tensors, index = self._tensors(gradients)
        bad_K1 = self._bad(tensors, index)
        if measure:
            self._underflow_K, self._norms_K = self._underflow(gradients, index), []
        world = self._ranks.world
        factor_K1 = [*(world / scale for scale in self.scales.values), float(world)]
        if tensors:
            torch._foreach_mul_(tensors, [factor_K1[k] for k in index])
        for values, k in zip(tensors, index, strict=True):
            if bad_K1[k]:
                values.zero_()
        self.scales.update(bad_K1[:-1])
        self._other_overflows += bad_K1[-1]
        blocks = [*range(len(self.scales)), None]
        return frozenset(block for block, bad in zip(blocks, bad_K1, strict=True) if bad)

    def measure_norms(self, gradients: list[Fragment], copies: int) -> None:
        """Norm of each block's gradient, as it is; `copies` of each piece exist among the ranks."""
        tensors, index = self._tensors(gradients)
        self._norms_K = self._norms(tensors, index, copies)

    def numbers(self) -> dict[str, float | list[float]]:
        """For the log, per resblock: scale, overflows so far, and what was measured last.

        `underflow` is the share of the matrices' gradient entries that are zero, `block_norm` the
        norm of the block's gradient in true units, absent where an update was skipped before the
        machines' mean; `other_overflows` are those outside of resblocks.
        """
        numbers: dict[str, float | list[float]] = {
            "scale": self.scales.values,
            "overflows": [float(count) for count in self.scales.overflows],
            "other_overflows": float(self._other_overflows),
        }
        measured = {"underflow": self._underflow_K, "block_norm": self._norms_K}
        return numbers | {name: values for name, values in measured.items() if values}

    def state_dict(self) -> dict[str, Any]:
        return self.scales.state_dict() | {"other_overflows": self._other_overflows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scales.load_state_dict(state)
        self._other_overflows = state.get("other_overflows", 0)  # not counted at first

    def _tensors(self, gradients: list[Fragment]) -> tuple[list[Tensor], list[int]]:
        """Values, and the number of the block that each belongs to."""
        index = [self._block.get(gradient.name, len(self.scales)) for gradient in gradients]
        return [gradient.values for gradient in gradients], index

    def _bad(self, tensors: list[Tensor], index: list[int]) -> list[bool]:
        flags_K1 = torch.zeros(len(self.scales) + 1, device=self._ranks.device)
        if tensors:
            peaks = torch.stack(torch._foreach_norm(tensors, torch.inf)).float()
            flags_K1.index_add_(0, self._on_device(index), (~peaks.isfinite()).float())
        return [flag > 0 for flag in self._ranks.max(flags_K1.tolist())]

    def _underflow(self, gradients: list[Fragment], index: list[int]) -> list[float]:
        zeros, sizes = [0.0] * len(self.scales), [0.0] * len(self.scales)
        for gradient, k in zip(gradients, index, strict=True):
            if gradient.name in self.matrices:
                zeros[k] += float((gradient.values == 0).sum())
                sizes[k] += gradient.values.numel()
        sums = self._ranks.sum(zeros + sizes)
        halves = zip(sums[: len(zeros)], sums[len(zeros) :], strict=True)
        return [zero / max(size, 1) for zero, size in halves]

    def _norms(self, tensors: list[Tensor], index: list[int], copies: int) -> list[float]:
        squares_K1 = torch.zeros(len(self.scales) + 1, device=self._ranks.device)
        if tensors:
            squares = torch.stack(torch._foreach_norm(tensors)).float().square()
            squares_K1.index_add_(0, self._on_device(index), squares)
        return [(total / copies) ** 0.5 for total in self._ranks.sum(squares_K1.tolist())[:-1]]

    def _on_device(self, index: list[int]) -> Tensor:
        return torch.tensor(index, device=self._ranks.device)
