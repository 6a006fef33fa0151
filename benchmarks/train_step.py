"""Tokens per second of one training step (forward, backward, AdamW) on the CPU, and rivals'.

The plain model is in rivals.py. DALLE-pytorch is measured where it is installed; in a throw-away
environment beside this package: `pip install --no-deps dalle-pytorch==1.6.6 g-mlp-pytorch
axial-positional-embedding rotary-embedding-torch einops` (its youtokentome does not install).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from unittest import mock

import torch
from dalle_kernels.sparse_attention import cpu
from torch import Tensor

from benchmarks import common, rivals
from benchmarks.common import Measured
from dalle_dist.config import HEAD_DIM, Config
from dalle_dist.optim.param_groups import param_groups
from dalle_dist.transformer.blocks import resblock_map
from dalle_dist.transformer.layout import layer_masks
from dalle_dist.transformer.model import Transformer

BATCH = 2
AXIAL = ("axial_row", "axial_col", "axial_row", "axial_row")


def main() -> None:
    options = common.arguments(__doc__, rounds=7)
    config = common.benchmark_config(options.smoke)
    text_BT, codes_BN = common.random_batch(config, BATCH)
    model = common.benchmark_model(config)
    check(model, text_BT, codes_BN)
    peak = common.gemm_peak(256 if options.smoke else 2048)
    times = common.interleaved(cases(model, text_BT, codes_BN), options.rounds)
    common.report("train_step", config, figures(config, times, peak), options)


def check(model: Transformer, text_BT: Tensor, codes_BN: Tensor) -> None:
    """Refuse to time a model whose loss or gradients differ from the dense reference's."""
    with mock.patch.object(cpu, "pays", return_value=False):
        dense_loss, dense = _loss_and_gradients(model, text_BT, codes_BN)
    loss, gradients = _loss_and_gradients(model, text_BT, codes_BN)
    torch.testing.assert_close(loss, dense_loss, rtol=1e-5, atol=0)
    for ours, reference in zip(gradients, dense, strict=True):
        error, size = (ours - reference).norm(), reference.norm()
        if not error <= 1e-4 * size + 1e-7:
            raise SystemExit(f"gradients differ from the reference's by {error:.2g} of {size:.2g}")


def cases(model: Transformer, text_BT: Tensor, codes_BN: Tensor) -> dict[str, Callable[[], None]]:
    shape = dataclasses.replace(model.config.transformer, masks="causal")
    causal = common.benchmark_model(dataclasses.replace(model.config, transformer=shape))
    boolean = _step(common.benchmark_model(model.config), text_BT, codes_BN)
    plain = rivals.PlainTransformer(model.config)
    found = {
        "ours": _step(model, text_BT, codes_BN),
        "ours, dense causal masks": _step(causal, text_BT, codes_BN),
        "ours, masks as booleans": mock.patch.object(cpu, "pays", lambda _: False)(boolean),
        "plain dense causal": rivals.trainer(
            lambda: plain(text_BT, codes_BN), torch.optim.AdamW(plain.parameters())
        ),
    }
    for name, attention in (("DALLE-pytorch full", ("full",)), ("DALLE-pytorch axial", AXIAL)):
        theirs = rivals.dalle_pytorch(model.config, attention)
        if theirs is None:
            print("DALLE-pytorch is not installed here, or takes no such images: not measured")
            break
        found[name] = _dalle_pytorch_step(theirs, text_BT, codes_BN)
    return found


def figures(config: Config, times: dict[str, list[float]], peak: Measured) -> list[Measured]:
    """Rates, ratios round by round, and the share of the GEMM peak."""
    tokens = BATCH * config.transformer.tokens
    rows = [
        Measured(name, "training step", "tokens/s", [tokens / t for t in took])
        for name, took in times.items()
    ]
    for name, took in times.items():
        if name != "ours":
            pairs = zip(took, times["ours"], strict=True)
            rows.append(Measured(f"ours / {name}", "speed", "x", [t / o for t, o in pairs]))
    rate = [step_flops(config) * 1e-9 / t for t in times["ours"]]
    share = [100 * r / peak.median for r in rate]
    return [*rows, peak, Measured("ours", "share of GEMM peak", "%", share)]


def step_flops(config: Config) -> float:
    """Products that the mathematics of our step needs: exact pairs, backward twice forward."""
    shape = config.transformer
    with torch.device("meta"):
        model = Transformer(config)
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    heads = shape.text_tokens * config.tokenizer.vocab_size
    heads += shape.image_tokens * config.transformer.codebook_size
    pairs = sum(int(mask.dense().sum()) for mask in layer_masks(shape))
    forward = 2 * blocks * shape.tokens + 2 * heads * shape.width
    forward += 4 * pairs * HEAD_DIM * shape.heads
    return 3.0 * BATCH * forward


def _step(model: Transformer, text_BT: Tensor, codes_BN: Tensor) -> Callable[[], None]:
    train = model.config.train
    groups = param_groups(model, resblock_map(model).matrices, train.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), fused=True)
    return rivals.trainer(lambda: model(text_BT, codes_BN).total(train.text_loss), optimizer)


def _dalle_pytorch_step(
    model: torch.nn.Module, text_BT: Tensor, codes_BN: Tensor
) -> Callable[[], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return rivals.trainer(
        lambda: model(text_BT, codes_BN, return_loss=True), torch.optim.AdamW(parameters)
    )


def _loss_and_gradients(
    model: Transformer, text_BT: Tensor, codes_BN: Tensor
) -> tuple[Tensor, list[Tensor]]:
    loss = model(text_BT, codes_BN).total(model.config.train.text_loss)
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


if __name__ == "__main__":
    main()
