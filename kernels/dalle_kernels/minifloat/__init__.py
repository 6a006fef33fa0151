"""16-bit storage formats of Adam's moments and PowerSGD's errors; `pack`, `unpack` are the entry.

`add_decoded` and `encode_rest` are the two passes of error feedback with errors in "1-6-9".
"""

from dalle_kernels.devices import BACKENDS
from dalle_kernels.minifloat.api import pack, unpack
from dalle_kernels.minifloat.error_feedback import add_decoded, encode_rest
from dalle_kernels.minifloat.formats import FORMATS, Format

__all__ = ["BACKENDS", "FORMATS", "Format", "add_decoded", "encode_rest", "pack", "unpack"]
