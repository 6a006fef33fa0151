"""Attention by the backend that the run will take, forward and backward, against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from dalle_kernels.masks import MASKS, AttentionMask
from dalle_kernels.sparse_attention import BACKENDS, quickest
from torch import Tensor

from dalle_dist.config import HEAD_DIM, Config
from dalle_dist.doctor.patient import Patient, grouped, values_of
from dalle_dist.doctor.report import Row, Verdict
from dalle_dist.transformer.layout import layer_masks

NAME = "attention"
TEXT, GRID, HEADS = 16, 16, 2  # of the small case
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest error as a share of the largest value of the reference in double precision: a few
# roundings of the dtype.
TOLERANCE = {"fp32": 1e-4, "fp16": 4e-3, "bf16": 3e-2}


def attention(patient: Patient) -> list[Row]:
    """One row: largest error over the model's kinds of masks; ranks beyond it are named."""
    masks, precision = _masks(patient.config), patient.precision
    answers = patient.meeting.everywhere(lambda: _measure(masks, precision, patient.ranks.device))
    rows, by_rank = patient.failures(NAME, answers), values_of(answers)
    wanted = f"error below {TOLERANCE[precision]:g}"
    wrong = {rank: f for rank, (_, f) in by_rank.items() if not f < TOLERANCE[precision]}
    for error, ranks in grouped({rank: f"{found:.1e}" for rank, found in wrong.items()}).items():
        text = f"error {error} in {precision} on {patient.meeting.named(ranks)}"
        rows.append(Row(NAME, Verdict.FAIL, text, wanted))
    for backend, who in patient.outliers(
        {r: backend for r, (backend, _) in by_rank.items()}
    ).items():
        rows.append(Row(NAME, Verdict.WARN, f"{backend} on {who}", "one backend"))
    if rows or not by_rank:
        return rows
    backend = by_rank[0][0]
    worst = max(error for _, error in by_rank.values())
    slow = backend == "reference" and patient.ranks.device.type == "cuda"
    text = f"{backend}, {precision}: error {worst:.1e}"
    text += "; without Triton it is slow" if slow else ""
    return [Row(NAME, Verdict.WARN if slow else Verdict.OK, text, wanted)]


def _masks(config: Config | None) -> list[AttentionMask]:
    """Those of the model, each kind once, at its own size."""
    if config is None:
        return [AttentionMask(kind, TEXT, GRID, kernel=11) for kind in MASKS]
    return list(dict.fromkeys(layer_masks(config.transformer)))


def _measure(
    masks: Sequence[AttentionMask], precision: str, device: torch.device
) -> tuple[str, float]:
    """(backend of the run, the largest error of a small case under these kinds of masks)."""
    worst, dtype = 0.0, DTYPES[precision]
    backends = [quickest(_random(mask.tokens, dtype, device), mask) for mask in masks]
    for mask, backend in zip(masks, backends, strict=True):
        small = replace(mask, text=TEXT, grid=GRID, kernel=min(mask.kernel, 5))
        qkv = _random(small.tokens, dtype, device)
        pairs = zip(_run(qkv, small, backend), _run(qkv.double(), small, "reference"), strict=True)
        for found, exact in pairs:
            error = float((found.double() - exact).abs().max() / exact.abs().max())
            worst = max(worst, error if error == error else float("inf"))
    return ", ".join(dict.fromkeys(backends)), worst


def _random(tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, tokens, 3, HEADS, HEAD_DIM, generator=generator).to(device, dtype)


def _run(qkv_BN3HD: Tensor, mask: AttentionMask, backend: str) -> tuple[Tensor, Tensor]:
    """(output, gradient of its weighted sum)."""
    leaf = qkv_BN3HD.clone().requires_grad_()
    out_BNHD = BACKENDS[backend](leaf, mask)
    weights = torch.linspace(-1, 1, out_BNHD.numel(), device=out_BNHD.device).view_as(out_BNHD)
    (gradient,) = torch.autograd.grad(out_BNHD, leaf, weights.to(out_BNHD.dtype))
    return out_BNHD.detach(), gradient
