"""The rate of matrix products that this machine reaches: what a run's MFU is a share of."""

from __future__ import annotations

import time

import torch
from torch import Tensor

SMALLEST, LARGEST = 256, 8_192  # rows and columns
RUNS = 3  # of each size


def gemm_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.25) -> float:
    """FLOP per second of the best of torch's square matrix products, sizes doubled in turn.

    A size is left out if it would end after that many `seconds`. The best depends on what else the
    machine does now.
    """
    _product(*_matrices(SMALLEST, device, dtype))  # the first call loads libraries
    best, size, end = 0.0, SMALLEST, time.perf_counter() + seconds
    while size <= LARGEST:
        matrices = _matrices(size, device, dtype)
        took = min(_product(*matrices) for _ in range(RUNS))
        best = max(best, 2 * size**3 / took)
        # Of the double size each run is eight times the work.
        if time.perf_counter() + RUNS * 8 * took > end:
            break
        size *= 2
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return best


def _matrices(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Of a generator of their own: the run's random numbers stay as they are.
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, generator=generator).to(dtype)
    return a, b


def _product(a: Tensor, b: Tensor) -> float:
    """Seconds."""
    _wait(a.device)
    start = time.perf_counter()
    torch.mm(a, b)
    _wait(a.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
