"""The update by torch operations, a piece at a time, so that fp32 copies of moments stay small.

Each product and sum is an operation of its own: `lerp_`, `addcmul_` and `add_(alpha=)` may fuse the
two roundings, and then no second implementation could agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_kernels.adamw.hyperparameters import Hyperparameters
from dalle_kernels.minifloat import pack, unpack

# Elements. On CPUs the temporaries of a piece (about 2 MB) stay in the second-level cache; on
# other devices a piece must be large enough to hide the launches.
CPU_PIECE = 1 << 16
DEVICE_PIECE = 1 << 24


def update(
    param: Tensor, grad: Tensor, mean: Tensor, variance: Tensor, by: Hyperparameters
) -> None:
    """See `adamw_`."""
    piece = CPU_PIECE if param.device.type == "cpu" else DEVICE_PIECE
    pieces = (tensor.view(-1).split(piece) for tensor in (param, grad, mean, variance))
    for p, g, m, v in zip(*pieces, strict=True):
        if m.dtype == torch.uint16:
            mean_piece, variance_piece = unpack(m, "1-6-9"), unpack(v, "0-6-10")
            _update(p, g.float(), mean_piece, variance_piece, by)
            m.copy_(pack(mean_piece, "1-6-9"))
            v.copy_(pack(variance_piece, "0-6-10"))
        else:
            _update(p, g.float(), m, v, by)


def _update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, by: Hyperparameters) -> None:
    m.mul_(by.beta1).add_(g * (1 - by.beta1))
    v.mul_(by.beta2).add_((g * g).mul_(1 - by.beta2))
    if by.variance_clip:
        v.clamp_(max=by.variance_clip)
    below = _sqrt(v).mul_(by.root).add_(by.eps)
    p.mul_(by.keep).sub_((m / below).mul_(by.size))


def _sqrt(v: Tensor) -> Tensor:
    """The fp32 number nearest to the root, on every processor.

    torch.sqrt of fp32 is the vendor library's on CPUs, and one unit in the last place off for every
    sixth argument on AMD's. The root of a 24-bit number keeps 2^-50 of itself away from every
    halfway point of fp32, so that a root in fp64 may even be a unit off before it is rounded.
    """
    return v.double().sqrt_().float()
