"""Which devices run Triton kernels."""

from __future__ import annotations

import importlib.util
import os

import torch


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
