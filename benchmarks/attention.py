"""Attention under the row, column and conv masks against dense, masked and FlexAttention.

Every contender is first compared with fp64; then all are timed in turn, and ratios are taken round
by round. On a GPU attention_gpu.py takes over. On a CPU: fp32, batch 2, the heads and states of the
training benchmark. FlexAttention has no backward on CPUs, and needs a C++ compiler there.

The floor on a CPU is the masks' exact pairs, 4 D products and sums each in the forward pass and
10 D in the backward one, at the speed of torch's matrix product measured in the same run.

Peak memory is what torch's CPU allocator holds at most above the inputs, in the second of two runs:
its log is exact, repeats, and sees the kernels' own buffers. The resident size of a process also
holds libraries, and pages that were freed. Results and gradients are 4 parts of q's size for ours
and for dense attention; ours is below it because its calls are smaller, and so are their buffers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from dalle_kernels.masks import AttentionMask

from benchmarks import attention_rivals, common
from benchmarks.attention_rivals import Contender
from benchmarks.common import Measured
from dalle_dist.config import HEAD_DIM

BATCH = 2
KINDS = ("row", "column", "conv")


def main() -> None:
    options = common.arguments(__doc__, rounds=31)
    if torch.cuda.is_available():
        from benchmarks import attention_gpu

        attention_gpu.run(options)
        return
    config = common.benchmark_config(options.smoke)
    shape = config.transformer
    torch.manual_seed(0)
    qkv_BN3HD = torch.randn(BATCH, shape.tokens, 3, shape.heads, HEAD_DIM)
    grad_BNHD = torch.randn(BATCH, shape.tokens, shape.heads, HEAD_DIM)
    peak = common.gemm_peak(256 if options.smoke else 2048)
    rows = [peak]
    for kind in KINDS:
        mask = AttentionMask(kind, shape.text_tokens, shape.image_grid, kernel=shape.conv_kernel)
        case = (qkv_BN3HD, grad_BNHD, mask)
        contenders = [
            attention_rivals.ours(*case, "cpu"),
            attention_rivals.boolean(*case),
            attention_rivals.dense(*case),
        ]
        if not options.smoke:  # a smoke test can do without a compiler
            for name, how in attention_rivals.FLEX_CPU.items():
                contenders += attention_rivals.flex(*case, name, how)
        contenders = checked(contenders, qkv_BN3HD, grad_BNHD)
        products = int(mask.dense().sum()) * BATCH * shape.heads * HEAD_DIM
        rows += cpu_figures(contenders, options.rounds, products * 1e-9 / peak.median)
    common.report("attention", config, rows, options)


def checked(contenders: Sequence[Contender], *batch: torch.Tensor) -> list[Contender]:
    """Those that may be timed; says which may not, and refuses to go on without ours."""
    right = []
    for contender in contenders:
        fault = attention_rivals.fault(contender, *batch)
        if fault is None:
            right.append(contender)
        elif contender.family == "ours":
            raise SystemExit(f"{contender.mask.kind}: ours is not timed: {fault}")
        else:
            print(f"{contender.mask.kind}: {contender.name} is left out: {fault}")
    return right


def cpu_figures(
    contenders: Sequence[Contender], rounds: int, seconds_per_product: float
) -> list[Measured]:
    """Of one mask; the last argument is of one product for all its pairs and head widths."""
    with torch.no_grad():
        forward = common.interleaved({c.name: c.forward for c in contenders}, rounds)
    trained = [c for c in contenders if c.has_backward]
    both = common.interleaved({c.name: c.both for c in trained}, rounds)
    kind = contenders[0].mask.kind
    families = {c.name: c.family for c in contenders}
    memory = {c.name: peak_memory(c.both) for c in trained}
    return [
        *figures(kind, "forward", forward, families, 4 * seconds_per_product),
        *figures(kind, "forward + backward", both, families, 14 * seconds_per_product),
        *(Measured(f"{kind}: {name}", "peak memory", "MiB", [m]) for name, m in memory.items()),
    ]


def figures(
    label: str,
    metric: str,
    times: Mapping[str, Sequence[float]],
    families: Mapping[str, str],
    floor: float | None = None,
) -> list[Measured]:
    """Times, ours against the best of each family of rivals, and its share of `floor` seconds."""
    ours = times["ours"]
    rows = [
        Measured(f"{label}: {name}", metric, "ms", [1e3 * t for t in took])
        for name, took in times.items()
    ]
    for family in dict.fromkeys(families[name] for name in times if name != "ours"):
        best = quickest(times, [name for name in times if families[name] == family])
        ratios = [t / o for t, o in zip(times[best], ours, strict=True)]
        rows.append(Measured(f"{label}: ours / {best}", f"{metric} speed", "x", ratios))
    if floor is not None:
        share = [100 * floor / t for t in ours]
        rows.append(Measured(f"{label}: ours", f"{metric} share of floor", "%", share))
    return rows


def quickest(times: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    return min(names, key=lambda name: statistics.median(times[name]))


def peak_memory(run: Callable[[], object]) -> float:
    """MiB that torch's CPU allocator hands out at most at a time during `run`."""
    run()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    log = profile.profiler.kineto_results.events()
    held = most = 0
    for event in sorted(log, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


if __name__ == "__main__":
    main()
