"""Ours and the rivals of the attention benchmark, each on inputs in the layout that suits it best.

Ours reads token-major qkv, rivals read contiguous q, k, v. FlexAttention gets a column mask with
the image tokens in column order, where the mask is a band: once with q, k, v moved there
beforehand, and once with the moves in the measured time, as a model would have to pay for them.

Shape suffixes: B batch, N tokens, H heads, D head width; 3 is query, key, value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch._dynamo.config as dynamo_config
import torch.nn.functional as F
from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention import reference, sparse_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

DENSE = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Flex(NamedTuple):
    """A way to compile FlexAttention; `table`: its mask is looked up, not computed."""

    block: int
    mode: str = "default"
    table: bool = False
    backend: Literal["AUTO", "FLASH"] = "AUTO"


TUNED = "max-autotune-no-cudagraphs"  # tries tiles, warps, stages; on Hopper blocks of 64 need it
FLEX_GPU = {
    "Flex 128": Flex(128),
    "Flex 128 tuned": Flex(128, TUNED),
    "Flex 64 tuned": Flex(64, TUNED),
}
FLEX_CPU = {
    f"Flex {block}{' table' * table}": Flex(block, table=table)
    for block in (64, 128)
    for table in (False, True)
}


@dataclass(frozen=True)
class Contender:
    """An attention on inputs of its own layout.

    family   rivals of one family are tried, and the best is taken
    mask     what it computes: the benchmark's mask, or "causal" for dense attention
    natural  from its own layout to [B, H, N, D], tokens in raster order
    """

    name: str
    family: str
    mask: AttentionMask
    attend: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    grad: Tensor
    natural: Callable[[Tensor], Tensor] = lambda x_BHND: x_BHND
    has_backward: bool = True

    def forward(self) -> Tensor:
        return self.attend(*self.inputs)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.inputs, self.grad)

    def both(self) -> tuple[Tensor, ...]:
        return self.backward(self.forward())


def ours(qkv_BN3HD: Tensor, grad_BNHD: Tensor, mask: AttentionMask, backend: str) -> Contender:
    return Contender(
        "ours", "ours", mask, lambda qkv: sparse_attention(qkv, mask, backend),
        (qkv_BN3HD.detach().requires_grad_(),), grad_BNHD,
        natural=lambda x: x.transpose(-3, -2) if x.ndim == 4 else x.permute(2, 0, 3, 1, 4),
    )  # fmt: skip


def dense(
    qkv_BN3HD: Tensor, grad_BNHD: Tensor, mask: AttentionMask, backend: str | None = None
) -> Contender:
    """Causal attention without a mask; by one of DENSE, or by what torch chooses."""
    causal = AttentionMask("causal", mask.text, mask.grid)

    def attend(*qkv: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(*qkv, is_causal=True)
        with sdpa_kernel(DENSE[backend]):
            return F.scaled_dot_product_attention(*qkv, is_causal=True)

    name = "SDPA causal" if backend is None else f"SDPA causal {backend}"
    inputs, grad = _head_major(qkv_BN3HD, grad_BNHD)
    return Contender(name, "SDPA causal", causal, attend, inputs, grad)


def boolean(qkv_BN3HD: Tensor, grad_BNHD: Tensor, mask: AttentionMask) -> Contender:
    """Attention with the mask as a boolean matrix."""
    allowed = mask.dense().to(qkv_BN3HD.device)
    inputs, grad = _head_major(qkv_BN3HD, grad_BNHD)
    return Contender(
        "SDPA boolean", "SDPA boolean", mask,
        lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=allowed), inputs, grad,
    )  # fmt: skip


def flex(
    qkv_BN3HD: Tensor, grad_BNHD: Tensor, mask: AttentionMask, name: str, how: Flex
) -> Iterator[Contender]:
    """Compiled FlexAttention; two contenders for a column mask, else one."""
    # Past its limit of recompilations torch would go on without compiling, and say so in passing.
    dynamo_config.recompile_limit, dynamo_config.fail_on_recompile_limit_hit = 64, True
    device, trains = qkv_BN3HD.device, qkv_BN3HD.is_cuda
    order, raster = (index.to(device) for index in band_order(mask))
    compiled = torch.compile(flex_attention, dynamic=False, mode=how.mode)
    allowed = mask_table(mask, order) if how.table else mask_mod(mask)
    blocks = create_block_mask(allowed, None, None, len(order), len(order), device, how.block)

    def attend(*qkv: Tensor) -> Tensor:
        return compiled(*qkv, block_mask=blocks, kernel_options={"BACKEND": how.backend})

    def moved(*qkv: Tensor) -> Tensor:
        return _Moved.apply(attend(*(_Moved.apply(x, order, raster) for x in qkv)), raster, order)

    inputs, grad = _head_major(qkv_BN3HD, grad_BNHD)
    inputs = tuple(x.requires_grad_(trains) for x in inputs)
    there = tuple(x.detach()[:, :, order].requires_grad_(trains) for x in inputs)
    yield Contender(
        name, "Flex", mask, attend, there, grad[:, :, order], lambda x: x[..., raster, :], trains
    )
    if mask.rule.by_column:
        yield Contender(
            f"{name} moved", "Flex moved", mask, moved, inputs, grad, has_backward=trains
        )


class _Moved(torch.autograd.Function):
    """Tokens put in another order, and their gradients put back: one copy each way."""

    @staticmethod
    def forward(ctx: Any, x_BHND: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return x_BHND.index_select(2, order)

    @staticmethod
    def backward(ctx: Any, grad_BHND: Tensor) -> tuple[Tensor, None, None]:
        return grad_BHND.index_select(2, ctx.back), None, None


def mask_mod(mask: AttentionMask) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's form of a mask, tokens in `band_order`: its rule, as our kernels have it."""
    text, grid, radius, rule = mask.text, mask.grid, mask.radius, mask.rule.visible

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((key < text) | rule(query - text, key - text, grid, radius))

    return allowed


def mask_table(
    mask: AttentionMask, order: Tensor
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same, looked up."""
    dense = mask.dense().to(order.device)[order][:, order].contiguous()
    return lambda b, h, query, key: dense[query, key]


def band_order(mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """Indices that put the tokens in the order in which the mask is a band, and back.

    Another order than their own only for a column mask: column by column.
    """
    image = [mask.text + mask.scan(position) for position in range(mask.image)]
    order = torch.tensor([*range(mask.text), *image])
    return order, order.argsort()


def fault(contender: Contender, qkv_BN3HD: Tensor, grad_BNHD: Tensor) -> str | None:
    """Why a contender is not to be timed: it fails, or errs by more than plain torch may.

    Of the first sample, against fp64 on the same rounded inputs: at most 2 times the error of plain
    torch in the same dtype, gradients 3 times.
    """
    one = (qkv_BN3HD[:1], grad_BNHD[:1])
    exact = _plain(*(x.double() for x in one), contender.mask)
    plain = _plain(*one, contender.mask)
    try:
        found = _results(contender)
    except Exception as error:  # whatever a compiler or a driver raises
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    for name, limit, a, b, c in zip(("output", "gradient"), (2, 3), found, plain, exact):  # noqa: B905
        error, allowed = (a - c).abs().max(), limit * (b - c).abs().max()
        if not error <= allowed:
            return f"{name} off by {error:.2g}, allowed {allowed:.2g}"
    return None


def _results(contender: Contender) -> list[Tensor]:
    """Output and, where there is one, gradient of the first sample, as `_plain` has them."""
    with torch.set_grad_enabled(contender.has_backward):
        out = contender.forward()
    found = [contender.natural(out.detach())[:1].double()]
    if contender.has_backward:
        grads = [contender.natural(x) for x in contender.backward(out)]
        grads_3BHND = grads[0] if len(grads) == 1 else torch.stack(grads)
        found.append(grads_3BHND[:, :1].double())
    return found


def _plain(qkv_BN3HD: Tensor, grad_BNHD: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
    qkv_BN3HD = qkv_BN3HD.detach().requires_grad_()
    out_BNHD = reference.attention(qkv_BN3HD, mask)
    (grad_BN3HD,) = torch.autograd.grad(out_BNHD, qkv_BN3HD, grad_BNHD)
    out_BHND = out_BNHD.detach().transpose(1, 2)
    return out_BHND.double(), grad_BN3HD.permute(2, 0, 3, 1, 4).double()


def _head_major(qkv_BN3HD: Tensor, grad_BNHD: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    q, k, v = (x.detach().contiguous() for x in qkv_BN3HD.permute(2, 0, 3, 1, 4))
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    return inputs, grad_BNHD.transpose(1, 2).contiguous()
