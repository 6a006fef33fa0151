"""Which devices run Triton kernels, and launches on the device of their tensors."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

BACKENDS = ("torch", "triton")  # of what both compute to the same bits


def triton_missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on that device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "the tensors are on the CPU"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"device {device.type} is no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, below 8.0"
    return None


def use_triton(tensor: Tensor, backend: str) -> bool:
    """Whether `backend` is Triton on this tensor's device; "auto" is: on GPUs where it runs.

    Raises:
        ValueError: another name than "auto" and `BACKENDS`, or "triton" where it cannot run.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if backend == "auto":
        return tensor.device.type != "cpu" and triton_missing(tensor.device) is None
    missing = triton_missing(tensor.device) if backend == "triton" else None
    if missing:
        raise ValueError(f"backend: 'triton' cannot run here: {missing}")
    return backend == "triton"


def multiprocessors(device: torch.device) -> int:
    """How many the GPU has; 1 where the kernels are interpreted."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def launching(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its tensors are on: makes it the tensor's.

    Every launch of a kernel stands in such a block.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
