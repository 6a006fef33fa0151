"""Which tiles are quickest: both attention kernels under each mask, on the GPU that is here.

bf16, batch 8, 62 heads of 64, 256 + 1,024 positions. `triton_config.py` is written from what this
says: its own choice is timed among the others, each after its results were compared with it. The
kernels are first compiled in as many processes as there are cores, which takes most of the time.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from dalle_kernels.masks import AttentionMask
from torch import Tensor

from benchmarks import attention_figures, common
from benchmarks.attention_gpu import BATCH, DTYPE, FLUSH, gpu_config, gpu_seconds
from benchmarks.common import Measured
from dalle_dist.config import HEAD_DIM

# BM, BT, BW, warps, stages
FORWARD = (
    (64, 64, 32, 4, 2), (64, 64, 32, 4, 4), (64, 64, 64, 4, 2), (64, 64, 64, 4, 3),
    (64, 128, 32, 4, 3), (64, 128, 64, 4, 2), (128, 64, 32, 4, 2), (128, 64, 32, 8, 2),
    (128, 64, 64, 8, 3), (128, 128, 32, 8, 2), (128, 128, 64, 8, 2),
)  # fmt: skip
BACKWARD = (
    (32, 64, 32, 4, 2), (32, 64, 32, 4, 4), (32, 64, 64, 4, 3), (32, 128, 32, 4, 2),
    (32, 128, 64, 4, 2), (32, 128, 64, 8, 3), (64, 64, 32, 4, 1), (64, 64, 32, 4, 2),
    (64, 64, 32, 4, 3), (64, 64, 32, 8, 2), (64, 64, 64, 4, 1), (64, 64, 64, 4, 2),
    (64, 64, 64, 4, 3), (64, 128, 32, 8, 2), (64, 128, 64, 8, 1), (64, 128, 64, 8, 2),
    (128, 64, 32, 8, 2), (128, 64, 64, 8, 2), (128, 128, 64, 8, 1), (128, 128, 64, 8, 2),
)  # fmt: skip
CLOSE = 1e-2  # of two results, relative to the larger norm: bf16 operands, sums in another order
Case = tuple[str, str, tuple[int, ...]]  # kind of mask, pass, tiles


def main() -> None:
    options = common.arguments(__doc__, rounds=31)
    if not torch.cuda.is_available():
        print("attention_tiles: not measured: no GPU")
        return
    shape = gpu_config(options.smoke).transformer
    place = shape.text_tokens, shape.image_grid, shape.conv_kernel
    kinds = attention_figures.KINDS[:1] if options.smoke else attention_figures.KINDS
    cases = [(kind, way, tiles) for kind in kinds for way, tiles in tried(options.smoke)]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        faults = dict(zip(cases, pool.map(partial(fault, *place), cases), strict=True))
    clock = partial(gpu_seconds, torch.empty(FLUSH, dtype=torch.uint8, device="cuda"))
    for kind in kinds:
        runs = Runs(kind, *place, BATCH, shape.heads)
        timed = {}
        for case in (case for case in cases if case[0] == kind):
            name = f"{kind}: {case[1]} {' '.join(map(str, case[2]))}"
            if faults[case]:
                print(f"{name} is left out: {faults[case]}")
            else:
                runs.check(case)
                timed[name] = partial(runs.prepare, case)
        times = common.interleaved(timed, options.rounds, clock)
        rows = [Measured(name, "time", "ms", [1e3 * t for t in times[name]]) for name in times]
        common.report("attention_tiles", gpu_config(options.smoke), rows, options, "cuda")


def tried(smoke: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    for way, choices in (("forward", FORWARD), ("backward", BACKWARD)):
        for tiles in choices[: 2 if smoke else None]:
            yield way, tiles


class Runs:
    """Both kernels of one mask on the same inputs, by any tiles."""

    def __init__(
        self, kind: str, text: int, grid: int, kernel: int, batch: int, heads: int
    ) -> None:
        # Here: on a machine without a GPU there may be no Triton.
        from dalle_kernels.sparse_attention import triton_backward, triton_config, triton_forward

        self.forward, self.backward = triton_forward.forward, triton_backward.backward
        self.tiles, self.mask = triton_config.Tiles, AttentionMask(kind, text, grid, kernel=kernel)
        self.chosen = {
            "forward": triton_config.forward_tiles(HEAD_DIM, DTYPE),
            "backward": triton_config.backward_tiles(
                torch.cuda.get_device_capability(), HEAD_DIM, DTYPE, self.mask
            ),
        }
        torch.manual_seed(0)
        shape = batch, self.mask.tokens, 3, heads, HEAD_DIM
        self.qkv_BN3HD = torch.randn(shape, device="cuda", dtype=DTYPE)
        self.out = self.forward(self.qkv_BN3HD, self.mask, self.chosen["forward"])
        self.grad_BNHD = torch.randn_like(self.out[0])

    def run(self, way: str, tiles: Any) -> Tensor:
        if way == "forward":
            return self.forward(self.qkv_BN3HD, self.mask, tiles)[0]
        return self.backward(self.grad_BNHD, self.qkv_BN3HD, *self.out, self.mask, tiles)

    def prepare(self, case: Case) -> partial[Tensor]:
        return partial(self.run, case[1], self.tiles(*case[2]))

    def check(self, case: Case) -> None:
        wanted, found = self.run(case[1], self.chosen[case[1]]), self.prepare(case)()
        error = (found.double() - wanted.double()).norm() / wanted.double().norm()
        if not error <= CLOSE:
            raise SystemExit(f"{case}: differs by {error:.2g}: not timed")


def fault(text: int, grid: int, kernel: int, case: Case) -> str | None:
    """Why these tiles cannot be had, such as too much shared memory; leaves them compiled.

    16 heads: their strides are multiples of 16, as those of 62 heads of 64 are.
    """
    try:
        Runs(case[0], text, grid, kernel, 1, 16).prepare(case)()
        torch.cuda.synchronize()
    except Exception as error:  # whatever a compiler or a driver raises
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


if __name__ == "__main__":
    main()
