"""The two entry points, two backends (paper 2.4, Fig. 4).

Triton passes over the values once, torch once for each operation; both give the same bits. To
filter is to put zero where a number is not finite. The host never waits for a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_kernels.devices import use_triton

DTYPES = (torch.float32, torch.float16)
NOT_FINITE = {"nan": 0.0, "posinf": 0.0, "neginf": 0.0}


def filter_and_scale(
    grad: Tensor, scale: Tensor, dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    """The filtered gradient times the scale, in `dtype`, contiguous.

    What only the scale or `dtype` makes too large becomes infinite. Triton reads 4 bytes per value
    and writes those of `dtype`.

    Args:
        grad: fp32, any shape and strides.
        scale: fp32, no axes, on the gradient's device.
        dtype: fp32 or fp16.
        backend: "torch" (any device), "triton", or "auto": Triton on GPUs where it runs.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(grad, scale)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype} is neither fp32 nor fp16")
    if use_triton(grad, backend):
        from dalle_kernels.scaled_gradients import triton_scaled_gradients

        return triton_scaled_gradients.launch_filter_and_scale(grad, scale, dtype)
    return grad.contiguous().nan_to_num(**NOT_FINITE).mul_(scale).to(dtype)


def unscale_and_filter(grad: Tensor, scale: Tensor, backend: str = "auto") -> Tensor:
    """The gradient divided by the scale, then filtered: fp32, contiguous.

    Triton reads and writes 4 bytes per value. Arguments and errors as for `filter_and_scale`.
    """
    _check(grad, scale)
    if use_triton(grad, backend):
        from dalle_kernels.scaled_gradients import triton_scaled_gradients

        return triton_scaled_gradients.launch_unscale_and_filter(grad, scale)
    return (grad.contiguous() / scale).nan_to_num_(**NOT_FINITE)


def _check(grad: Tensor, scale: Tensor) -> None:
    if grad.dtype != torch.float32:
        raise ValueError(f"grad: dtype {grad.dtype} is not fp32")
    if scale.dtype != torch.float32 or scale.ndim or scale.device != grad.device:
        raise ValueError(
            f"scale: {scale.dtype} {tuple(scale.shape)} on {scale.device}, "
            f"not an fp32 number on {grad.device}"
        )
