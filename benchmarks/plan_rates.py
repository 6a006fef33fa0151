"""A `Hardware` made by measurement: what this machine reaches at the shapes of a config.

All ranks measure at once, because they share cores, memory and loopback when they train.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from dalle_kernels.sparse_attention import sparse_attention
from torch import Tensor

from dalle_dist.config import HEAD_DIM, Config, from_dict, to_dict
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.deepspeed.build import build_engine
from dalle_dist.gradients.powersgd.orthogonal import orthonormal_BMR
from dalle_dist.optim.adamw import AdamW
from dalle_dist.plan.hardware import Hardware, hardware
from dalle_dist.plan.timing import MODULES, OPERATIONS, PASSES, optimizer_passes
from dalle_dist.precision.linear import ResblockLinear
from dalle_dist.precision.scaled_branch import scaled_branch
from dalle_dist.precision.scales import BlockScale, BlockScales
from dalle_dist.transformer.blocks import Layer
from dalle_dist.transformer.embeddings import LayerNorm
from dalle_dist.transformer.layout import layer_masks
from dalle_dist.transformer.loss_model import LossTransformer

_LAYERS = 4  # of the model whose hooks are timed
ROUNDS, DTYPES = 5, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measured(ranks: Ranks, config: Config, shape: tuple[int, int, int], values: int) -> Hardware:
    """Rates as the slowest rank has them.

    Args:
        shape: of the P's that are orthogonalised together: how many, rows, rank; zeros: none.
        values: of the weights that a rank updates.
    """
    precision, attention = config.train.precision, _attention(config)
    rates = {
        "peak_16": _linear(config),
        "peak_fp32": _linear(_in_fp32(config)),
        "attention_forward": attention[0],
        "attention_backward": attention[1],
        "bandwidth": _passes(config),
        "optimizer": _adamw(config, values),
        "copies": _copies(config),
        **_hooks(ranks, config),
        "launches_per_s": 1 / _launch(config),
        "link": _link(ranks, 1 << 19),
        "factors_per_s": 1 / _factor(shape),
        "starts_per_s": 1 / _start(ranks),
    }
    slowest = {name: -top for name, top in zip(rates, ranks.max([-r for r in rates.values()]),
                                               strict=True)}  # fmt: skip
    peak = slowest["peak_fp32" if precision == "fp32" else "peak_16"]
    return replace(
        hardware("h100-80"),
        name="this machine",
        device="cpu",
        source="measured",
        peak_16=slowest["peak_16"],
        peak_fp32=slowest["peak_fp32"],
        peak_tf32=0.0,
        gemm_share=1.0,
        fp32_share=1.0,
        attention_forward_share=slowest["attention_forward"] / peak,
        attention_backward_share=slowest["attention_backward"] / peak,
        bandwidth=slowest["bandwidth"],
        memory_share=1.0,
        optimizer_share=slowest["optimizer"] / slowest["bandwidth"],
        copy_share=slowest["copies"] / slowest["bandwidth"],
        link=slowest["link"],
        link_share=1.0,
        wire_share=1.0,
        wire=8 * slowest["link"] * (config.parallel.local_world_size or ranks.world),
        overlap=0.0,
        launch_s=1 / slowest["launches_per_s"],
        module_s=1 / slowest["modules_per_s"],
        gradient_s=1 / slowest["gradients_per_s"],
        factor_s=1 / slowest["factors_per_s"],
        collective_s=1 / slowest["starts_per_s"],
        asynchronous=False,
    )


def _seconds(action: Callable[[], Any]) -> float:
    """The median of a few rounds, after one that does not count."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[ROUNDS // 2]


def _in_fp32(config: Config) -> Config:
    return replace(config, train=replace(config.train, precision="fp32"))


def _linear(config: Config) -> float:
    """FLOP/s of the matrices of a layer, forward and backward."""
    width, dtype = config.transformer.width, DTYPES[config.train.precision]
    sizes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    rows = config.train.micro_batch * config.transformer.tokens
    held = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    layers = [ResblockLinear(i, o).to(held) for i, o in sizes]
    for layer in layers:
        torch.nn.init.normal_(layer.weight, std=0.02)
    inputs = [torch.randn(rows, i).to(dtype).requires_grad_() for i, _ in sizes]

    def run() -> None:
        for layer, input in zip(layers, inputs, strict=True):
            out = layer(input)
            torch.autograd.grad(out, [input, *layer.parameters()], torch.ones_like(out))

    return 6 * rows * sum(i * o for i, o in sizes) / _seconds(run)


def _attention(config: Config) -> tuple[float, float]:
    """FLOP/s on the pairs that the masks allow, forward and backward."""
    shape, dtype = config.transformer, DTYPES[config.train.precision]
    samples, masks = config.train.micro_batch, layer_masks(shape)
    size = (samples, shape.tokens, 3, shape.heads, HEAD_DIM)
    qkv = torch.randn(size).to(dtype).requires_grad_()
    outs: list[Tensor] = []

    def forward() -> None:
        outs[:] = [sparse_attention(qkv, mask) for mask in masks]

    def backward() -> None:
        for out in outs:
            torch.autograd.grad(out, qkv, torch.ones_like(out), retain_graph=True)

    flop = 4 * samples * shape.width * sum(int(mask.dense().sum()) for mask in masks)
    return flop / _seconds(forward), 2 * flop / _seconds(backward)


def _passes(config: Config) -> float:
    """Bytes/s of what is no product in a layer: norms, GELU, sums, casts, scales."""
    shape, precision = config.transformer, config.train.precision
    dtype, x_size = DTYPES[precision], (config.train.micro_batch, shape.tokens, shape.width)
    x = torch.randn(x_size, requires_grad=True)
    inner = torch.randn(*x_size[:-1], 4 * shape.width).to(dtype).requires_grad_()
    norm = LayerNorm(shape.width).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    scales = BlockScales(1, 1, torch.device("cpu"))

    def block(x: Tensor) -> Tensor:
        if precision == "fp16":
            return x + scaled_branch(x, norm, lambda h: h, BlockScale(scales, 0, dtype))
        return x + norm(x)

    def run() -> None:
        out = torch.nn.functional.gelu(inner)
        torch.autograd.grad(out, inner, torch.ones_like(out))
        out = block(block(x))
        torch.autograd.grad(out, x, torch.ones_like(out))

    return sum(PASSES[precision]) * x.numel() / _seconds(run)


def _adamw(config: Config, values: int) -> float:
    """Bytes/s of AdamW and what DeepSpeed does around it, counted as the plan counts them."""
    weight, train = torch.nn.Parameter(torch.randn(values)), config.train
    gradient = torch.randn_like(weight)
    optimizer = AdamW([{"params": [weight], "moments": train.moments}], lr=1e-4)
    flat = train.zero_stage == 3

    def run() -> None:
        weight.grad = gradient if flat else torch.cat([gradient])
        (weight.grad if flat else weight.grad.double()).norm(2)
        weight.grad.mul_(1.0)
        optimizer.step()
        if not flat:
            gradient.copy_(weight.detach())

    return optimizer_passes(train.moments, 4, train.zero_stage) * values / _seconds(run)


def _copies(config: Config) -> float:
    """Bytes/s of a layer's gradients into a bucket, divided, flat, and added to an fp32 sum."""
    size, dtype = 12 * config.transformer.width**2, DTYPES[config.train.precision]
    parts, sums = torch.randn(size).to(dtype).chunk(4), torch.zeros(size)

    def run() -> None:
        bucket = torch.cat(parts)
        flat = torch.cat(bucket.div_(1.0).chunk(4))
        sums.add_(flat.float())

    width = dtype.itemsize
    cast = 0 if width == 4 else width + 4
    return (6 * width + cast + 12) * size / _seconds(run)


def _tiny(config: Config, **others: dict[str, Any]) -> Config:
    """Too small to compute anything."""
    tree = to_dict(config)
    tree["transformer"] |= {"width": 64, "heads": 1, "layers": 1, "text_tokens": 2}
    tree["transformer"] |= {"image_grid": 2, "conv_kernel": 1, "codebook_size": 8}
    tree["tokenizer"]["vocab_size"] = 300
    tree["image_tokenizer"]["kind"] = "measured"
    for section, values in others.items():
        tree[section] |= values
    return from_dict(tree)


def _hooks(ranks: Ranks, config: Config) -> dict[str, float]:
    """DeepSpeed's hooks per second, without collectives: of modules, and of gradients."""
    if not config.train.zero_stage:
        return {"modules_per_s": 1e9, "gradients_per_s": 1e9}
    train = {"batch_size": ranks.world, "micro_batch": 1, "precision": "fp32"}
    alone = {"between_nodes": "dense", "local_world_size": 1}
    tiny = _tiny(config, transformer={"layers": _LAYERS}, train=train, parallel=alone)
    plain = LossTransformer(tiny)
    engine = build_engine(LossTransformer(tiny), tiny.train, ranks, parallel=tiny.parallel)
    inputs = (torch.full((1, 2), 3), torch.zeros(1, 4, dtype=torch.long))
    there, back = _both_ways(plain, lambda loss: loss.backward(), inputs)
    hooked, hooked_back = _both_ways(engine, engine.backward, inputs)
    module = max(hooked - there, 1e-9) / (_LAYERS * MODULES)
    left = hooked_back - back - (module * _LAYERS * MODULES if engine.zero_stage == 3 else 0.0)
    gradient = max(left, 1e-9) / len(engine.shapes)
    return {"modules_per_s": 1 / module, "gradients_per_s": 1 / gradient}


def _both_ways(
    model: Callable[..., Tensor], backward: Callable[[Tensor], Any], inputs: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass."""
    times = []
    for _ in range(4 * ROUNDS):
        start = time.perf_counter()
        loss = model(*inputs)[0]
        middle = time.perf_counter()
        backward(loss)
        times.append((middle - start, time.perf_counter() - middle))
    there, back = (sorted(way)[len(way) // 2] for way in zip(*times, strict=True))
    return there, back


def _launch(config: Config) -> float:
    """Seconds of the host for an operation of a layer too small to compute anything."""
    precision = config.train.precision
    shape = _tiny(config).transformer
    layer = Layer(64, layer_masks(shape)[0])
    if precision == "bf16":
        layer.bfloat16()
    if precision == "fp16":
        scales = BlockScales(2, 1, torch.device("cpu"))
        for number, block in enumerate((layer.attention, layer.mlp)):
            block.scale = BlockScale(scales, number, torch.float16)
    x = torch.randn(1, shape.tokens, 64, requires_grad=True)
    parameters = [x, *layer.parameters()]

    def run() -> None:
        for _ in range(20):
            out = layer(x)
            torch.autograd.grad(out, parameters, torch.ones_like(out), allow_unused=True)

    return _seconds(run) / (20 * sum(OPERATIONS[precision]))


def _link(ranks: Ranks, size: int) -> float:
    """Bytes/s that a rank sends in an all-reduce of fp32."""
    if ranks.world == 1:
        return 1e12
    values = torch.zeros(size)

    def run() -> None:
        dist.all_reduce(values)

    return 2 * 4 * size * (ranks.world - 1) / ranks.world / _seconds(run)


def _start(ranks: Ranks) -> float:
    if not dist.is_initialized():
        return 1e-6
    value = torch.zeros(1)
    return _seconds(lambda: [dist.all_reduce(value) for _ in range(20)]) / 20


def _factor(shape: tuple[int, int, int]) -> float:
    if not all(shape):
        return 1e-9
    p = torch.randn(shape)
    return _seconds(lambda: orthonormal_BMR(p.clone()))
