"""Attention under DALL-E's masks; `sparse_attention` is the one entry point."""

from dalle_kernels.sparse_attention.api import BACKENDS, sparse_attention
from dalle_kernels.sparse_attention.decode import DecodeCache
from dalle_kernels.sparse_attention.window import WindowCache

__all__ = ["BACKENDS", "DecodeCache", "WindowCache", "sparse_attention"]
