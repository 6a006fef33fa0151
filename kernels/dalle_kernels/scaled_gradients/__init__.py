"""Where gradients enter and leave a residual branch that computes in fp16: filter and scale."""

from dalle_kernels.devices import BACKENDS
from dalle_kernels.scaled_gradients.api import filter_and_scale, unscale_and_filter

__all__ = ["BACKENDS", "filter_and_scale", "unscale_and_filter"]
