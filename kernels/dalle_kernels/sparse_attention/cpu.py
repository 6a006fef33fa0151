"""Attention that skips what the mask hides, by torch's fused CPU kernel on slices of q, k and v.

Text queries look at text: one causal call. An image query looks at all text and at few image keys:
one unmasked call over the text, and one small call per strip of queries over the keys that its span
reaches; both outcomes are merged by their log-sum-exps. The backward pass hands every call the
merged output and log-sum-exp: with those, a call's gradients are its share of the whole softmax's.
Its strips are of keys, with the queries that reach them: strips that overlap in queries have one
gradient to add up, strips that overlap in keys two.
All that the calls read are slices of qkv; nothing is gathered, no N x N matrix is built.

Shape suffixes: B batch, N tokens, H heads, D head width, I image tokens, Q queries and K keys of a
strip; 3 is query, key, value.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dalle_kernels.masks import AttentionMask
from dalle_kernels.spans import span
from dalle_kernels.sparse_attention import reference

# The kernels behind torch's scaled_dot_product_attention on CPUs. They are called by name because
# the public function keeps the log-sum-exp to itself.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

QUERIES, KEYS = 32, 64  # of a forward and of a backward call, at least; measured


class Strip(NamedTuple):
    """Image tokens as slices of all tokens; `bias_QK` is 0 or -inf, None for a causal square."""

    queries: slice
    keys: slice
    bias_QK: Tensor | None


def pays(mask: AttentionMask) -> bool:
    """Whether an image is large enough for several calls to be quicker than a dense one."""
    return mask.image > 128


def attention(qkv_BN3HD: Tensor, mask: AttentionMask) -> Tensor:
    """out_BNHD; see `sparse_attention`."""
    if mask.is_causal:
        return reference.attention(qkv_BN3HD, mask)
    return _Attention.apply(qkv_BN3HD, mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_BN3HD: Tensor, mask: AttentionMask) -> Tensor:
        if qkv_BN3HD.stride(-1) != 1:
            qkv_BN3HD = qkv_BN3HD.contiguous()
        q, k, v = qkv_BN3HD.permute(2, 0, 3, 1, 4)
        text, image = slice(mask.text), slice(mask.text, None)
        out_BNHD = torch.empty_like(qkv_BN3HD[:, :, 0])
        out = out_BNHD.transpose(1, 2)
        from_text, from_text_lse_BHI = _flash(q[:, :, image], k[:, :, text], v[:, :, text])
        lse_BHN = from_text_lse_BHI.new_empty(q.shape[:3])
        out[:, :, text], lse_BHN[:, :, text] = _flash(
            q[:, :, text], k[:, :, text], v[:, :, text], 0.0, True
        )
        for queries, keys, bias in _strips(mask, qkv_BN3HD.dtype, of_keys=False):
            out[:, :, queries], lse_BHN[:, :, queries] = _flash(
                q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, bias is None, attn_mask=bias
            )
        _merge(out[:, :, image], lse_BHN[:, :, image], from_text, from_text_lse_BHI)
        ctx.save_for_backward(qkv_BN3HD, out_BNHD, lse_BHN)
        ctx.mask = mask
        return out_BNHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNHD: Tensor) -> tuple[Tensor, None]:
        qkv_BN3HD, out_BNHD, lse_BHN = ctx.saved_tensors
        mask: AttentionMask = ctx.mask
        text, image = slice(mask.text), slice(mask.text, None)
        q, k, v = qkv_BN3HD.permute(2, 0, 3, 1, 4)
        out, grad = (x.transpose(1, 2) for x in (out_BNHD, grad_BNHD.contiguous()))

        def share(strip: Strip, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            queries, keys, bias = strip
            return _flash_backward(
                grad[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys],
                out[:, :, queries], lse_BHN[:, :, queries], 0.0, is_causal, attn_mask=bias,
            )  # fmt: skip

        # The call with the largest results goes first, before memory is taken for all gradients.
        from_text = share(Strip(image, text, None), False)
        grad_qkv_BN3HD = torch.empty_like(qkv_BN3HD, memory_format=torch.contiguous_format)
        dq, dk, dv = grad_qkv_BN3HD.permute(2, 0, 3, 1, 4)
        dq[:, :, image], dk[:, :, text], dv[:, :, text] = from_text
        del from_text
        dq[:, :, text], text_dk, text_dv = share(Strip(text, text, None), True)
        dk[:, :, text] += text_dk
        dv[:, :, text] += text_dv
        for strip in _strips(mask, qkv_BN3HD.dtype, of_keys=True):
            strip_dq, dk[:, :, strip.keys], dv[:, :, strip.keys] = share(
                strip, strip.bias_QK is None
            )
            dq[:, :, strip.queries] += strip_dq
        return grad_qkv_BN3HD, None


def _merge(image: Tensor, image_lse: Tensor, text: Tensor, text_lse: Tensor) -> None:
    """Softmax over image and text keys, from each set's own, into the image's; spoils `text`."""
    image_share = torch.sigmoid(image_lse - text_lse)[..., None]
    image.copy_(text.to(image_share).lerp_(image.to(image_share), image_share))
    image_lse.copy_(torch.logaddexp(image_lse, text_lse))


# Kept for later calls, so never inference tensors, which autograd would refuse.
@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _strips(mask: AttentionMask, dtype: torch.dtype, of_keys: bool) -> tuple[Strip, ...]:
    allowed_II, strips = mask.image_part(), list[Strip]()
    for queries, keys in _slices(mask, of_keys):
        allowed_QK = allowed_II[queries, keys]
        square = allowed_QK.shape[0] == allowed_QK.shape[1]
        bias = None
        if not (square and allowed_QK.equal(torch.ones_like(allowed_QK).tril())):
            bias = torch.zeros(allowed_QK.shape, dtype=dtype, device="cpu")
            bias.masked_fill_(~allowed_QK, -torch.inf)
            # Most strips of a picture are alike.
            if strips and (last := strips[-1].bias_QK) is not None and bias.equal(last):
                bias = last
        strips.append(Strip(_shifted(queries, mask.text), _shifted(keys, mask.text), bias))
    return tuple(strips)


def _slices(mask: AttentionMask, of_keys: bool) -> Iterator[tuple[slice, slice]]:
    """Queries and keys of each strip, as slices of the image tokens."""
    band, grid = span(mask), mask.grid
    if band.by_column:
        yield from ((slice(c, mask.image, grid),) * 2 for c in range(grid))
    else:
        step = grid * max(1, (KEYS if of_keys else QUERIES) // grid)
        for start in range(0, mask.image, step):
            stop = min(start + step, mask.image)
            if of_keys:
                yield slice(start, band.queries_end(stop - 1)), slice(start, stop)
            else:
                yield slice(start, stop), slice(band.first_key(start), stop)


def _shifted(tokens: slice, by: int) -> slice:
    return slice(tokens.start + by, tokens.stop + by, tokens.step)
