"""Rivals of the attention benchmark on a GPU that are packages of their own, where installed.

FlashAttention 3 (`flash_attn_interface`) has no such masks: it is timed as dense causal attention.
FlexAttention on FlashAttention 4's kernels (`flash_attn.cute`), and cuDNN's attention with a
modifier of the scores (`cudnn`, of nvidia-cudnn-frontend), get the mask itself.

Shape suffixes: B batch, N tokens, H heads, D head width; 3 is query, key, value.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from dalle_kernels.masks import AttentionMask
from torch import Tensor

from benchmarks import attention_rivals
from benchmarks.attention_rivals import Contender, Flex

Rivals = Callable[[Tensor, Tensor, AttentionMask], Iterator[Contender]]
FLEX_FLASH = Flex(128, backend="FLASH")


def installed(qkv_BN3HD: Tensor, grad_BNHD: Tensor, mask: AttentionMask) -> Iterator[Contender]:
    """Those whose package is there; says of each other one which is missing."""
    for name, (module, rivals) in PACKAGES.items():
        if _is_installed(module):
            yield from rivals(qkv_BN3HD, grad_BNHD, mask)
        else:
            print(f"{mask.kind}: {name} is left out: {module} is not installed")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that the module would be in
        return False


def flash_3(qkv_BN3HD: Tensor, grad_BNHD: Tensor, mask: AttentionMask) -> Iterator[Contender]:
    """FlashAttention 3, dense and causal, on contiguous q, k, v of tokens by heads."""
    causal = AttentionMask("causal", mask.text, mask.grid)

    def attend(*qkv_BNHD: Tensor) -> Tensor:
        # At the call: a package that does not load is then left out like one that errs.
        import flash_attn_interface  # type: ignore[import-not-found, unused-ignore]

        out = flash_attn_interface.flash_attn_func(*qkv_BNHD, causal=True)
        return out[0] if isinstance(out, tuple) else out  # early versions add log-sum-exps

    inputs = tuple(x.detach().contiguous().requires_grad_() for x in qkv_BN3HD.unbind(2))
    yield Contender(
        "FA3 causal", "FA3 causal", causal, attend, inputs, grad_BNHD,
        natural=lambda x_BNHD: x_BNHD.transpose(1, 2),
    )  # fmt: skip


def flex_flash(qkv_BN3HD: Tensor, grad_BNHD: Tensor, mask: AttentionMask) -> Iterator[Contender]:
    """FlexAttention as torch compiles it for FlashAttention 4."""
    return attention_rivals.flex(qkv_BN3HD, grad_BNHD, mask, "Flex FLASH", FLEX_FLASH)


def flex_cudnn(qkv_BN3HD: Tensor, grad_BNHD: Tensor, mask: AttentionMask) -> Iterator[Contender]:
    """cuDNN's attention, forward alone: its modifier of the scores adds a table of the mask."""
    inputs = tuple(x.detach().contiguous() for x in qkv_BN3HD.permute(2, 0, 3, 1, 4))
    table = torch.zeros(1, 1, mask.tokens, mask.tokens, dtype=torch.float32, device="cpu")
    table = table.masked_fill(~mask.dense().cpu(), -torch.inf).to(qkv_BN3HD.device)
    graph = lru_cache(maxsize=1)(lambda: _CudnnGraph(inputs, table))
    yield Contender(
        "cuDNN score_mod", "cuDNN score_mod", mask, lambda *qkv: graph().run(*qkv, table),
        inputs, grad_BNHD.transpose(1, 2).contiguous(), has_backward=False,
    )  # fmt: skip


class _CudnnGraph:
    """cuDNN's plan of attention with a table added to the scores, and its scratch memory."""

    def __init__(self, inputs: tuple[Tensor, ...], table: Tensor) -> None:
        import cudnn  # type: ignore[import-not-found, unused-ignore]

        kind = cudnn.data_type
        self.graph = cudnn.pygraph(
            io_data_type=kind.BFLOAT16, intermediate_data_type=kind.FLOAT,
            compute_data_type=kind.FLOAT,
        )  # fmt: skip
        self.inputs = [self.graph.tensor_like(x) for x in (*inputs, table)]
        *qkv, added = self.inputs

        def modified(graph: Any, scores: Any) -> Any:
            return graph.add(a=scores, b=added)

        self.out, _ = self.graph.sdpa(
            *qkv, attn_scale=inputs[0].shape[-1] ** -0.5, generate_stats=False, score_mod=modified
        )
        q_BHND = inputs[0]
        self.out.set_output(True).set_dim(list(q_BHND.shape)).set_stride(list(q_BHND.stride()))
        self.graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        size = self.graph.get_workspace_size()
        self.workspace = torch.empty(size, dtype=torch.uint8, device=q_BHND.device)

    def run(self, *tensors: Tensor) -> Tensor:
        out_BHND = torch.empty_like(tensors[0])
        given = dict(zip(self.inputs, tensors, strict=True)) | {self.out: out_BHND}
        self.graph.execute(given, self.workspace)
        return out_BHND


PACKAGES: dict[str, tuple[str, Rivals]] = {
    "FA3 causal": ("flash_attn_interface", flash_3),
    "Flex FLASH": ("flash_attn.cute", flex_flash),
    "cuDNN score_mod": ("cudnn", flex_cudnn),
}
