"""One AdamW update of one tensor, with fp32 or 16-bit moments; `adamw_` is the entry point."""

from dalle_kernels.adamw.api import BACKENDS, adamw_
from dalle_kernels.adamw.hyperparameters import Hyperparameters

__all__ = ["BACKENDS", "Hyperparameters", "adamw_"]
