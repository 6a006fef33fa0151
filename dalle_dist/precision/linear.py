"""Linear layers of the resblocks: fp32 parameters, products in the dtype of what comes in.

Shape suffixes: R rows of any leading shape, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ResblockLinear(nn.Module):
    """x @ weight + bias that, fed with fp16, rounds its matrix to fp16.

    On CPUs the bias is added in fp32; a GPU's product takes it in fp16. The matrix's gradient is
    rounded to fp16, as the paper has it, the bias's is summed in fp32 (2.4). Fed with the dtype of
    its parameters it is a plain linear layer.

    Args:
        inputs_first: the weight is [I, O] instead of [O, I]. ZeRO-3 cuts along the first axis, and
            pieces of a matrix compress best when that is its long one (paper, Table 2).
    """

    def __init__(self, inputs: int, outputs: int, inputs_first: bool = False) -> None:
        super().__init__()
        self.in_features, self.inputs_first = inputs, inputs_first
        shape = (inputs, outputs) if inputs_first else (outputs, inputs)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == torch.float16:
            return _Linear16.apply(input, self.weight, self.bias, self.inputs_first)
        weight_OI = self.weight.t() if self.inputs_first else self.weight
        return F.linear(input, weight_OI, self.bias)


class _Linear16(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, weight: Tensor, bias_O: Tensor, inputs_first: bool
    ) -> Tensor:
        # The parameter itself is kept, not its fp16 copy: ZeRO-3 takes it away and brings it back.
        ctx.save_for_backward(x_RI, weight)
        ctx.inputs_first, ctx.dtypes = inputs_first, (weight.dtype, bias_O.dtype)
        half = weight.half()
        return _product(x_RI, half if inputs_first else half.t(), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_RI, weight = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        half = weight.half()
        grad_RI = _product(grad_RO, half.t() if ctx.inputs_first else half)
        flat_RO, flat_RI = grad_RO.flatten(0, -2), x_RI.flatten(0, -2)
        left, right = (flat_RI, flat_RO) if ctx.inputs_first else (flat_RO, flat_RI)
        grad = _product(left.t(), right).to(weight_dtype)
        return grad_RI, grad, flat_RO.sum(0, dtype=torch.float32).to(bias_dtype), None


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias in fp16 with fp32 sums, as tensor cores do it; on CPUs through fp32."""
    if a.is_cuda:
        return F.linear(a, b.t(), None if bias is None else bias.half())
    out = a.float() @ b.float()
    return (out if bias is None else out + bias.float()).half()
