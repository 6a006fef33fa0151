"""One entry point, three backends, one arithmetic.

In fp32, every operation rounded by itself, with p, g, m, v for parameter, gradient and moments:

    m <- m b1 + g (1 - b1)
    v <- min(v b2 + (g g)(1 - b2), clip)
    p <- p (1 - lr decay) - (m / (sqrt(v) root + eps)) size

where root = 1 / sqrt(1 - b2^step) and size = lr / (1 - b1^step). The clip comes before v is used
for anything (paper B.2). 16-bit moments are unpacked, updated, used, and rounded only when stored.
"chunked" and "triton" agree bit for bit; "fused" is torch's own kernel, within rounding of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from dalle_kernels.adamw import chunked
from dalle_kernels.adamw.hyperparameters import Hyperparameters
from dalle_kernels.devices import triton_missing

GRADIENTS = (torch.float32, torch.float16, torch.bfloat16)
MOMENTS = (torch.float32, torch.uint16)


def _fused(
    param: Tensor, grad: Tensor, mean: Tensor, variance: Tensor, by: Hyperparameters
) -> None:
    if not _fusible(param, grad, mean, by):
        raise ValueError("backend: 'fused' takes a CPU, fp32 throughout, and no variance clip")
    step = torch.tensor(float(by.step))
    torch._fused_adamw_(
        [param], [grad], [mean], [variance], [], [step],
        lr=by.lr, beta1=by.beta1, beta2=by.beta2, eps=by.eps, weight_decay=by.weight_decay,
        amsgrad=False, maximize=False,
    )  # fmt: skip


def _triton(
    param: Tensor, grad: Tensor, mean: Tensor, variance: Tensor, by: Hyperparameters
) -> None:
    missing = triton_missing(param.device)
    if missing:
        raise ValueError(f"backend: 'triton' cannot run here: {missing}")
    from dalle_kernels.adamw import triton_adamw

    triton_adamw.update(param, grad, mean, variance, by)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Hyperparameters], None]] = {
    "fused": _fused,
    "chunked": chunked.update,
    "triton": _triton,
}


@torch.no_grad()
def adamw_(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    variance: Tensor,
    by: Hyperparameters,
    backend: str = "auto",
) -> None:
    """Update `param`, `mean` and `variance` in place.

    Args:
        param: fp32, contiguous, any shape.
        grad: fp32, fp16 or bf16, of that shape.
        mean, variance: both fp32, or both uint16 words of "1-6-9" and "0-6-10"; contiguous.
        by: the step and its hyperparameters.
        backend: "fused" (torch's; fp32 on CPUs), "chunked" (torch on any device, a few MB of
            temporaries), "triton", or "auto": the quickest that runs here.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(param, grad, mean, variance)
    if not isinstance(by, Hyperparameters):
        raise ValueError(f"by: {type(by).__name__} is not the Hyperparameters of a step")
    if backend == "auto":
        backend = _quickest(param, grad, mean, by)
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    BACKENDS[backend](param, grad.contiguous(), mean, variance, by)


def _check(param: Tensor, grad: Tensor, mean: Tensor, variance: Tensor) -> None:
    named = {"param": param, "grad": grad, "mean": mean, "variance": variance}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: {type(value).__name__} is not a tensor")
    for name, tensor, dtypes in (
        ("param", param, (torch.float32,)),
        ("grad", grad, GRADIENTS),
        ("mean", mean, MOMENTS),
        ("variance", variance, (mean.dtype,)),
    ):
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name}: dtype {tensor.dtype} is not one of {dtypes}")
        if tensor.shape != param.shape or tensor.device != param.device:
            raise ValueError(
                f"{name}: {tuple(tensor.shape)} on {tensor.device}, but param is "
                f"{tuple(param.shape)} on {param.device}"
            )
        if name != "grad" and not tensor.is_contiguous():
            raise ValueError(f"{name}: is not contiguous")


def _quickest(param: Tensor, grad: Tensor, mean: Tensor, by: Hyperparameters) -> str:
    if param.device.type == "cpu":
        return "fused" if _fusible(param, grad, mean, by) else "chunked"
    missing = triton_missing(param.device)
    if missing is None:
        return "triton"
    _warn(missing)
    return "chunked"


def _fusible(param: Tensor, grad: Tensor, mean: Tensor, by: Hyperparameters) -> bool:
    plain = grad.dtype == mean.dtype == torch.float32 and not by.variance_clip
    return plain and param.device.type == "cpu"


@lru_cache
def _warn(missing: str) -> None:
    """Once per reason and process."""
    message = f"adamw_ falls back to separate torch operations (chunked): {missing}"
    warnings.warn(message, RuntimeWarning, stacklevel=4)
