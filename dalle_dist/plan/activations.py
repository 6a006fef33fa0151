"""Bytes that autograd keeps of a micro-batch, counted along `transformer/blocks.py`.

Shape letters: B samples, S positions, W width, H heads; x is one B S W of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from dalle_dist.config import HEAD_DIM
from dalle_dist.plan.model import Model
from dalle_dist.plan.settings import Settings


@dataclass(frozen=True)
class Activations:
    """Bytes.

    layer        kept of one layer between forward and backward pass
    input        of one layer: the fp32 stream
    top          kept of the last norm and the unembeddings
    logits       fp32 logits of a micro-batch
    passing      in a layer's forward pass, beside what is kept
    inside       gradients within a layer while its backward pass goes through the MLP
    layer_grads  gradients of a layer's matrices before DeepSpeed takes them
    """

    layer: int
    input: int
    top: int
    logits: int
    passing: int
    inside: int
    layer_grads: int

    @classmethod
    def of(cls, model: Model, settings: Settings) -> Activations:
        shape, samples = model.transformer, settings.samples
        positions = samples * shape.tokens
        x, c = positions * shape.width, settings.compute_bytes
        statistics = 2 * 4 * positions  # mean and deviation of a layer norm
        softmax = 4 * positions * (shape.width // HEAD_DIM)  # log of the sum of each query
        # norm's input, its output, q k v, attention's output
        attention = 4 * x + statistics + c * x + 3 * c * x + c * x + softmax
        # norm's input, its output, GELU's input and output
        mlp = 4 * x + statistics + c * x + 4 * c * x + 4 * c * x
        weights = settings.weight_bytes
        top = 4 * x + statistics + weights * x
        if weights == 2:  # unembeddings compute on fp32 copies
            classes = model.text_classes + shape.codebook_size
            top += 4 * x + 4 * classes * shape.width
        largest = 4 * shape.width**2
        rounded = 2 * largest if settings.precision == "fp16" else 0
        return cls(
            attention + mlp,
            4 * x,
            top,
            4 * model.logits(samples),
            _passing(x, shape.width, settings),
            # of the MLP's inner layer, and of the stream twice
            4 * c * x + 2 * 4 * x,
            weights * largest + rounded,
        )


def _passing(x: int, width: int, settings: Settings) -> int:
    """The stream, its first embeddings, and of the MLP what no layer keeps."""
    stream, c = 2 * 4 * x, settings.compute_bytes
    checkpointed = settings.train.checkpoint_activations
    if settings.precision == "fp16" and settings.fp16_by_fp32:
        # Of a product: what comes in and the matrix, or what goes out with and without its bias.
        down, up = 4 * 4 * x + 4 * x + 6 * 4 * width**2, 4 * x * (4 + 4 + 2)
        return stream + (c * x + up if checkpointed else max(down, up - 2 * c * 4 * x))
    # The norm's output, GELU's input and output.
    return stream + (c * x * (1 + 4 + 4) if checkpointed else 0)
