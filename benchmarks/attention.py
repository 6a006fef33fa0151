"""Attention under the row, column and conv masks against dense, masked and FlexAttention.

Every contender is first compared with fp64; then all are timed in turn, and ratios are taken round
by round. On a GPU attention_gpu.py takes over. On a CPU: fp32, batch 2, the heads and positions of
the training benchmark. FlexAttention has no backward on CPUs, and needs a C++ compiler there.

The floor on a CPU is the masks' exact pairs, 4 D products and sums each in the forward pass and
10 D in the backward one, at the speed of torch's matrix product measured in the same run.

Peak memory is what torch's CPU allocator holds at most above the inputs, in the second of two runs:
its log is exact, repeats, and sees the kernels' own buffers. The resident size of a process also
holds libraries, and pages that were freed. Results and gradients are 4 parts of q's size for ours
and for dense attention; ours is below it because its calls are smaller, and so are their buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dalle_kernels.masks import AttentionMask

from benchmarks import attention_figures, attention_gpu, attention_rivals, common
from benchmarks.attention_rivals import Contender
from benchmarks.common import Measured
from dalle_dist.config import HEAD_DIM

BATCH = 2


def main() -> None:
    options = common.arguments(__doc__, rounds=31)
    if torch.cuda.is_available():
        attention_gpu.run(options)
        return
    config = common.benchmark_config(options.smoke)
    shape = config.transformer
    torch.manual_seed(0)
    qkv_BN3HD = torch.randn(BATCH, shape.tokens, 3, shape.heads, HEAD_DIM)
    grad_BNHD = torch.randn(BATCH, shape.tokens, shape.heads, HEAD_DIM)
    peak = common.gemm_peak(256 if options.smoke else 2048)
    rows = [peak]
    for kind in attention_figures.KINDS:
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
        contenders = attention_figures.checked(contenders, qkv_BN3HD, grad_BNHD)
        products = int(mask.dense().sum()) * BATCH * shape.heads * HEAD_DIM
        rows += cpu_figures(contenders, options.rounds, products * 1e-9 / peak.median)
    common.report("attention", config, rows, options)


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
    memory = {c.name: common.peak_memory(c.both) for c in trained}
    return [
        *attention_figures.figures(kind, "forward", forward, families, 4 * seconds_per_product),
        *attention_figures.figures(
            kind, "forward + backward", both, families, 14 * seconds_per_product
        ),
        *(Measured(f"{kind}: {name}", "peak memory", "MiB", [m]) for name, m in memory.items()),
    ]


if __name__ == "__main__":
    main()
