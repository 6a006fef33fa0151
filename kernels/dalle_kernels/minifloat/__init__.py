"""16-bit storage formats of Adam's moments; `pack` and `unpack` are the entry points."""

from dalle_kernels.minifloat.api import BACKENDS, pack, unpack
from dalle_kernels.minifloat.formats import FORMATS, Format

__all__ = ["BACKENDS", "FORMATS", "Format", "pack", "unpack"]
