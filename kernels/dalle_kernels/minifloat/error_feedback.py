"""The two passes of error feedback whose errors are kept as 1-6-9 words (paper E.2).

Triton passes over the values once, torch once for each operation; both give the same bits. Backends
and their errors are those of `pack`.

Shapes: B matrices of M rows and N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_kernels.devices import use_triton
from dalle_kernels.minifloat import torch_minifloat
from dalle_kernels.minifloat.formats import FORMATS

FORMAT = FORMATS["1-6-9"]


def add_decoded(
    values_BMN: Tensor, codes_BMN: Tensor, factor_B: Tensor, backend: str = "auto"
) -> None:
    """values := values * factor + decoded codes, in place; where a factor is 0, the codes alone.

    So 0 drops values that are not finite. Triton moves 10 bytes per value.

    Args:
        values_BMN: fp32; each matrix contiguous, any distance from one to the next.
        codes_BMN: uint16, contiguous.
        factor_B: fp32.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(values_BMN, ("codes", codes_BMN, torch.uint16))
    if factor_B.dtype != torch.float32 or factor_B.shape != values_BMN.shape[:1]:
        raise ValueError(
            f"factor: {factor_B.dtype} {tuple(factor_B.shape)}, not fp32 ({len(values_BMN)},)"
        )
    if use_triton(values_BMN, backend):
        from dalle_kernels.minifloat import triton_error_feedback

        triton_error_feedback.launch_add_decoded(values_BMN, codes_BMN, factor_B)
        return
    spread_B11 = factor_B[:, None, None]
    # To ask the CPU costs less than to pass over the values; to ask a GPU would be to wait.
    ask = factor_B.device.type == "cpu"
    if not ask or (factor_B == 0).any():
        values_BMN.masked_fill_(spread_B11 == 0, 0)
    if not ask or (factor_B != 1).any():
        values_BMN.mul_(spread_B11)
    values_BMN.add_(torch_minifloat.unpack(codes_BMN, FORMAT))


def encode_rest(
    values_BMN: Tensor, sent_BMN: Tensor, codes_BMN: Tensor, backend: str = "auto"
) -> None:
    """codes := words of values - sent, of 0 where that is NaN; then values := sent.

    Triton moves 14 bytes per value.

    Args:
        values_BMN, codes_BMN: as for `add_decoded`.
        sent_BMN: fp32, contiguous.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(values_BMN, ("sent", sent_BMN, torch.float32), ("codes", codes_BMN, torch.uint16))
    if use_triton(values_BMN, backend):
        from dalle_kernels.minifloat import triton_error_feedback

        triton_error_feedback.launch_encode_rest(values_BMN, sent_BMN, codes_BMN)
        return
    rest_BMN = (values_BMN - sent_BMN).nan_to_num_(nan=0.0)
    codes_BMN.copy_(torch_minifloat.pack(rest_BMN, FORMAT))
    values_BMN.copy_(sent_BMN)


def _check(values_BMN: Tensor, *others: tuple[str, Tensor, torch.dtype]) -> None:
    if values_BMN.dtype != torch.float32 or values_BMN.ndim != 3:
        raise ValueError(f"values: {values_BMN.dtype} with {values_BMN.ndim} axes, not fp32 with 3")
    inner, apart = values_BMN.shape[1:].numel(), values_BMN.stride(0)
    if len(values_BMN) and not values_BMN[0].is_contiguous():
        raise ValueError(f"values: strides {values_BMN.stride()} of {tuple(values_BMN.shape)}")
    if len(values_BMN) > 1 and apart < inner:
        raise ValueError(f"values: matrices of {inner} values overlap, {apart} from one another")
    for name, tensor, dtype in others:
        if tensor.dtype != dtype or tensor.shape != values_BMN.shape:
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)}, not {dtype} "
                f"{tuple(values_BMN.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: is not contiguous")
