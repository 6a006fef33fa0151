"""The attention benchmark on a GPU: bf16, batch 8, 62 heads of 64, 256 + 1,024 positions.

Forward and backward passes by CUDA events, each after a write that empties the L2 cache and lasts
until the call is queued. Then one layer of the paper's width, and a training step of a few, ours
against the same model with dense attention: at that width attention is a small part of either.

Shape suffixes: B batch, N positions, W width, H heads, D head width; 3 is query, key, value.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention import reference
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from benchmarks import attention_figures, attention_packages, attention_rivals, common, rivals
from benchmarks.attention_rivals import DENSE, FLEX_GPU
from benchmarks.common import Measured
from dalle_dist.config import HEAD_DIM, Config, TransformerConfig, from_dict
from dalle_dist.transformer import blocks

BATCH, LAYERS = 8, 4
DTYPE, BYTES = torch.bfloat16, 2
FLUSH = 2**29  # bytes written before a timed call, several times any L2 cache
FLUSHES = 4


class Peak(NamedTuple):
    """What a GPU reaches per second: products and sums, bytes, exponentials.

    Below the data sheets: about 80% of the matrix units' rate, 90% of the memory's.
    """

    flops: float
    bytes: float
    exps: float


PEAKS = {
    "NVIDIA H200": Peak(790e12, 4.3e12, 3.7e12),
    "NVIDIA H100 80GB HBM3": Peak(790e12, 3.0e12, 3.7e12),
}


def run(options: argparse.Namespace) -> None:
    """Measure and report; `options` are those of `common.arguments`."""
    config = gpu_config(options.smoke)
    shape, rounds = config.transformer, options.rounds
    torch.manual_seed(0)
    qkv_BN3HD = torch.randn(
        BATCH, shape.tokens, 3, shape.heads, HEAD_DIM, device="cuda", dtype=DTYPE
    )
    grad_BNHD = torch.randn_like(qkv_BN3HD[:, :, 0], memory_format=torch.contiguous_format)
    clock = partial(gpu_seconds, torch.empty(FLUSH, dtype=torch.uint8, device="cuda"))
    for kind in attention_figures.KINDS:
        mask = AttentionMask(kind, shape.text_tokens, shape.image_grid, kernel=shape.conv_kernel)
        op_rows, dense = op_figures(qkv_BN3HD, grad_BNHD, mask, options, clock)
        layer = blocks.Layer(shape.width, mask).to("cuda", DTYPE)
        step = layer_step(layer, shape)
        rows = gain(f"layer {kind}", "forward + backward", step, dense, shape, rounds, clock)
        # At once: compiling the rivals takes minutes, and what is measured is not to be lost.
        common.report("attention", config, [*op_rows, *rows], options, "cuda")
        del layer, step
    name = f"{shape.layers} layers"
    rows = gain(name, "training step", training_step(config), dense, shape, rounds, clock)
    common.report("attention", config, rows, options, "cuda")


def gpu_config(smoke: bool) -> Config:
    """The paper's width, heads and vocabularies with few layers."""
    tiny = {
        "width": 128,
        "heads": 2,
        "text_tokens": 16,
        "image_grid": 12,
        "codebook_size": 32,
        "conv_kernel": 3,
    }
    return from_dict(
        {
            "name": "smoke-gpu" if smoke else "b8-h62-d64",
            "tokenizer": {"vocab_size": 300 if smoke else 16_384},
            "dvae": {"image_size": 96 if smoke else 256, "codebook_size": 32 if smoke else 8_192},
            "transformer": {"layers": LAYERS, **(tiny if smoke else {})},
            "train": {"precision": "bf16", "checkpoint_activations": False},
        }
    )


def gpu_seconds(scratch: Tensor, prepare: Callable[[], Callable[[], Any]]) -> float:
    """Of what `prepare` returns, on the device, from a cold L2 cache.

    The writes keep the device busy while the host queues the call: its own time is not counted.
    """
    call = prepare()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(FLUSHES):
        scratch.zero_()
    start.record()
    result = call()
    stop.record()
    stop.synchronize()
    del result
    return 1e-3 * start.elapsed_time(stop)


def op_figures(
    qkv_BN3HD: Tensor,
    grad_BNHD: Tensor,
    mask: AttentionMask,
    options: argparse.Namespace,
    clock: Callable[[Callable[[], Any]], float],
) -> tuple[list[Measured], str]:
    """Figures of one mask, and the dense backend that is quickest forward and backward together."""
    case = (qkv_BN3HD, grad_BNHD, mask)
    contenders = [attention_rivals.ours(*case, "triton")]
    contenders += [attention_rivals.dense(*case, backend) for backend in DENSE]
    for name, how in FLEX_GPU.items():
        contenders += attention_rivals.flex(*case, name, how)
    contenders += attention_packages.installed(*case)
    contenders = attention_figures.checked(contenders, qkv_BN3HD, grad_BNHD)
    forward = common.interleaved(
        {c.name: partial(_same, c.forward) for c in contenders}, options.rounds, clock
    )
    trained = [c for c in contenders if c.has_backward]
    backward = common.interleaved(
        {c.name: partial(_backward_of, c) for c in trained}, options.rounds, clock
    )
    families = {c.name: c.family for c in contenders}
    floors = floor_seconds(qkv_BN3HD, mask)
    rows = attention_figures.figures(mask.kind, "forward", forward, families, floors[0])
    rows += attention_figures.figures(mask.kind, "backward", backward, families, floors[1])
    both = {
        name: [a + b for a, b in zip(forward[name], backward[name], strict=True)]
        for name in backward
    }
    dense = [name for name in both if families[name] == "SDPA causal"]
    return rows, attention_figures.quickest(both, dense).rpartition(" ")[2]


def _same(run: Callable[[], Any]) -> Callable[[], Any]:
    return run


def _backward_of(contender: attention_rivals.Contender) -> Callable[[], Any]:
    return partial(contender.backward, contender.forward())


def floor_seconds(qkv_BN3HD: Tensor, mask: AttentionMask) -> tuple[float | None, float | None]:
    """Least time of the forward and the backward pass; None on a GPU that is not in PEAKS.

    The longest of: the exact pairs' products (4 D and 10 D each), one exponential per pair, and
    moving q, k, v, o (backward also do, dq, dk, dv) and the fp32 log-sum-exps once.
    """
    peak = PEAKS.get(torch.cuda.get_device_name(qkv_BN3HD.device))
    if peak is None:
        return None, None
    batch, tokens, _, heads, width = qkv_BN3HD.shape
    pairs = int(mask.dense().sum()) * batch * heads
    tensor, lse = qkv_BN3HD.numel() // 3 * BYTES, 4 * batch * heads * tokens

    def longest(products: int, tensors: int) -> float:
        moved = tensors * tensor + lse
        return max(products * width * pairs / peak.flops, pairs / peak.exps, moved / peak.bytes)

    return longest(4, 4), longest(10, 8)


def gain(
    label: str,
    metric: str,
    step: Callable[[], Any],
    dense: str,
    shape: TransformerConfig,
    rounds: int,
    clock: Callable[[Callable[[], Any]], float],
) -> list[Measured]:
    """`step` as it is, and with dense causal attention by that backend in the place of ours.

    The dense one reads the token-major q, k, v of the same layer, as a model's does.
    """
    causal = AttentionMask("causal", shape.text_tokens, shape.image_grid)

    def attend(qkv_BN3HD: Tensor, mask: AttentionMask) -> Tensor:
        with sdpa_kernel(DENSE[dense]):
            return reference.attention(qkv_BN3HD, causal)

    def dense_step() -> None:
        with mock.patch.object(blocks, "sparse_attention", attend):
            step()

    name = f"dense {dense}"
    cases = {"ours": partial(_same, step), name: partial(_same, dense_step)}
    times = common.interleaved(cases, rounds, clock)
    families = {"ours": "ours", name: "dense"}
    return attention_figures.figures(label, metric, times, families)


def layer_step(layer: blocks.Layer, shape: TransformerConfig) -> Callable[[], Any]:
    """Forward and backward of one layer (both resblocks), in the fp32 stream of the model."""
    x_BNW = torch.randn(BATCH, shape.tokens, shape.width, device="cuda", requires_grad=True)
    grad_BNW = torch.randn_like(x_BNW)
    leaves = (x_BNW, *layer.parameters())
    return lambda: torch.autograd.grad(layer(x_BNW), leaves, grad_BNW)


def training_step(config: Config) -> Callable[[], None]:
    """Forward, backward and AdamW of a model of few layers, its parameters bf16."""
    model = common.benchmark_model(config).to("cuda", DTYPE)
    text_BT, codes_BN = (x.cuda() for x in common.random_batch(config, BATCH))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return rivals.trainer(lambda: model(text_BT, codes_BN).total(config.train.text_loss), optimizer)
