"""How fast a run goes, how far it is and how much memory it takes: numbers of each log line."""

from __future__ import annotations

import resource
import time

import torch

from dalle_dist.distributed.process_group import Ranks
from dalle_dist.train.data import Progress
from dalle_dist.train.peak import gemm_peak
from dalle_dist.train.stage import Stage


class Speed:
    """Made by all ranks at once, which measure the peak of their matrix products together."""

    def __init__(self, stage: Stage, ranks: Ranks) -> None:
        self._stage, self._ranks = stage, ranks
        self._flop = stage.flop(ranks.device) * stage.settings.batch_size
        dtype = stage.dtype
        if ranks.device.type == "cpu" and dtype == torch.float16:
            dtype = torch.float32  # in which CPUs compute fp16's products
        ranks.barrier()
        self._peak = ranks.sum([gemm_peak(ranks.device, dtype)])[0]
        # Seconds in steps since the last line, those of them in which data was waited for, steps.
        self._busy, self._waited, self._counted = 0.0, 0.0, 0
        self._began, self._steps = 0.0, 0  # of this process

    def add(self, seconds: float, waited: float) -> None:
        """Take note of an optimizer step that has just ended, and of its wait for its samples."""
        if not self._steps:
            self._began = time.perf_counter() - seconds
        self._steps += 1
        self._busy, self._counted = self._busy + seconds, self._counted + 1
        self._waited += waited

    def numbers(self, step: int, progress: Progress) -> dict[str, float]:
        """Since the last call; after `step` steps of the run, of all ranks. A collective call.

        seconds_per_step   in optimizer steps alone, without evaluations, images and checkpoints
        images_per_s, tokens_per_s   (stage 2) by that
        data_wait          share of that in which the rank that waits longest has waited for samples
        mfu                model FLOP per second as a share of the ranks' peak
        epoch              how often the training set has been seen
        peak_memory_bytes  of the rank that has taken most, so far: on GPUs what torch allocated, on
                           CPUs what the process held
        seconds_left       to the last step, at the pace since this process began, with all it does
        """
        settings, stage = self._stage.settings, self._stage
        seconds, waited = self._busy / self._counted, self._waited / self._busy
        self._busy, self._waited, self._counted = 0.0, 0.0, 0
        peak, wait = self._ranks.max([peak_memory(self._ranks.device), waited])
        images = settings.batch_size / seconds
        tokens = {"tokens_per_s": images * stage.tokens} if stage.tokens else {}
        pace = (time.perf_counter() - self._began) / self._steps
        return {
            "seconds_per_step": seconds,
            "images_per_s": images,
            **tokens,
            "data_wait": wait,
            "mfu": self._flop / seconds / self._peak,
            "epoch": progress.samples / progress.total,
            "peak_memory_bytes": peak,
            "seconds_left": pace * (settings.steps - step),
        }


def peak_memory(device: torch.device) -> float:
    """Bytes that this process has taken at most, of the GPU or, without one, of main memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
