"""One AdamW update of one tensor, with fp32 or 16-bit moments; `adamw_` is the entry point."""

from dalle_kernels.adamw.api import BACKENDS, Settings, adamw_

__all__ = ["BACKENDS", "Settings", "adamw_"]
