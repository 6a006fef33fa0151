"""The entry points; Triton is imported when they are first called.

Shape suffixes: M pairs of seed and position, K codebook entries, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_kernels.devices import triton_missing


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run there and are quicker than torch's: on GPUs that Triton takes."""
    return device.type == "cuda" and triton_missing(device) is None


def add_norm(
    x_W: Tensor, branch_W: Tensor | None, weight_W: Tensor, bias_W: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + branch, fp32; its layer norm over the last axis, in the dtype of the weight).

    Args:
        x_W: fp32, of any leading shape, contiguous.
        branch_W: the same shape, of any dtype; None: nothing is added.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if x_W.dtype != torch.float32:
        raise ValueError(f"x: dtype {x_W.dtype} is not fp32")
    if x_W.shape[-1:] != weight_W.shape or weight_W.shape != bias_W.shape:
        raise ValueError(f"x: width {x_W.shape[-1]} is not that of the weight, {len(weight_W)}")
    if branch_W is not None and branch_W.shape != x_W.shape:
        raise ValueError(f"branch: shape {tuple(branch_W.shape)} is not x's, {tuple(x_W.shape)}")
    for name, given in (("x", x_W), ("branch", branch_W)):
        if given is not None and not given.is_contiguous():
            raise ValueError(f"{name}: strides {given.stride()} are not contiguous")
    from dalle_kernels.generation.triton_generation import launch_add_norm

    return launch_add_norm(x_W, branch_W, weight_W, bias_W, eps)


def gumbel(seed_M: Tensor, position_M: Tensor, codebook_size: int) -> Tensor:
    """Standard Gumbel noise_MK, fp32: a function of (seed, position, code), all int64.

    Raises:
        ValueError: not as many positions as seeds.
    """
    if seed_M.shape != position_M.shape or seed_M.ndim != 1:
        raise ValueError(
            f"position: shape {tuple(position_M.shape)} is not the seeds', {tuple(seed_M.shape)}"
        )
    from dalle_kernels.generation.triton_generation import launch_gumbel

    return launch_gumbel(seed_M, position_M, codebook_size)
