"""How long a rank's own work takes in a step, without its waits for other ranks.

That is its wait for samples and its forward passes: in these no rank waits for another, but under
ZeRO-3, and where the loss is of all ranks' samples. There it is the processor's time in them, which
tells of a slow host, and not of a slow GPU.
"""

from __future__ import annotations

import time
from types import TracebackType

import torch


class OwnTime:
    """Enter it for each forward pass.

    Args:
        alone: whether forward passes wait for no other rank.
    """

    def __init__(self, device: torch.device, alone: bool) -> None:
        self._on_gpu = alone and device.type == "cuda"
        self._clock = time.perf_counter if alone else time.thread_time
        self._seconds, self._steps, self._began = 0.0, 0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._on_gpu:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events.append((events[0], events[1]))
            events[0].record()
        else:
            self._began = self._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += self._clock() - self._began

    def add_step(self, waited: float) -> None:
        """A step has ended, before which samples were waited for so many seconds."""
        self._seconds, self._steps = self._seconds + waited, self._steps + 1

    def take(self) -> float:
        """Seconds of a step since the last call; there must have been one, and the GPU is done."""
        on_gpu = sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
        seconds = (self._seconds + on_gpu) / self._steps
        self._seconds, self._steps, self._events = 0.0, 0, []
        return seconds
