"""DALL-E's attention masks and the kernels that exploit them; imports nothing of dalle_dist.

sparse_attention(qkv, mask)        attention that skips what an AttentionMask hides
DecodeCache(mask, samples)         the same for images that are generated token by token
BlockCache(mask, samples, block)   the same for several tokens at once, at positions of their own
adamw_(param, grad, mean, variance, by)   one AdamW update in place, by AdamWHyperparameters
pack(x, fmt), unpack(bits, fmt)    Adam's moments in 16 bits
scaled_gradients                   gradients into fp16 and out of it, scaled and filtered
generation                         what else a step of generating takes on a GPU
"""

from dalle_kernels.adamw import Hyperparameters as AdamWHyperparameters
from dalle_kernels.adamw import adamw_
from dalle_kernels.masks import AttentionMask
from dalle_kernels.minifloat import pack, unpack

# The function takes the place of the subpackage of that name as an attribute; what the subpackage
# holds is still imported by `from dalle_kernels.sparse_attention import ...`.
from dalle_kernels.sparse_attention import BlockCache, DecodeCache, sparse_attention

__all__ = [
    "AdamWHyperparameters",
    "AttentionMask",
    "BlockCache",
    "DecodeCache",
    "adamw_",
    "pack",
    "sparse_attention",
    "unpack",
]
