"""Attention under DALL-E's masks; `sparse_attention` is the one entry point."""

from dalle_kernels.sparse_attention.api import BACKENDS, quickest, sparse_attention
from dalle_kernels.sparse_attention.decode import DecodeCache
from dalle_kernels.sparse_attention.decode_block import BlockCache

__all__ = ["BACKENDS", "BlockCache", "DecodeCache", "quickest", "sparse_attention"]
