"""One optimizer step whose result is known, asked of the DeepSpeed that is installed.

Names that exist may mean something else than they did: a release kept all of them and divided
gradients once more. So a run begins with the step of a model whose gradient is its input.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dalle_dist.config import StageConfig
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.deepspeed.build import build_engine
from dalle_dist.engine.deepspeed.engine import DeepSpeedEngine
from dalle_dist.engine.deepspeed.versions import TESTED
from dalle_dist.errors import ConfigError

SIZE = 12  # rows and columns of the weight
ACCUMULATED = 2  # micro-batches
LR = 2.0**-6


class _Known(nn.Module):
    """Its loss is the sum of weight x input: the gradient is the input, of all micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x.to(self.weight.dtype)).float().sum()


def check_known_step(settings: StageConfig, ranks: Ranks) -> None:
    """In the precision and ZeRO stage of a run; a collective call.

    Raises ConfigError on all ranks: gradients, their norm or the weights are not what they must be.
    """
    import deepspeed

    known = replace(
        settings,
        batch_size=ACCUMULATED * ranks.world,
        micro_batch=1,
        clip=0.0,
        moments="fp32",
        variance_clip=0.0,
        weight_decay=0.0,
        adamw_backend="auto",
        compile=False,
    )
    engine = build_engine(_Known(), known, ranks)
    ones = torch.ones(SIZE, SIZE, device=ranks.device)
    for number in range(ACCUMULATED):
        engine.backward(engine(ones * (1 + number * ranks.world + ranks.rank)))
    count = ACCUMULATED * ranks.world
    wrong = _wrong(engine, count * (count + 1) / 2)
    if ranks.any(bool(wrong)):
        found = next(text for text in ranks.gather(wrong) if text)
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} computes a step otherwise than it must: {found}; "
            f"install {TESTED[0]}"
        )


def _wrong(engine: DeepSpeedEngine, gradient: float) -> str:
    """What is not as it must be on this rank, or "". All elements have the same gradient."""
    norm, precise = gradient * SIZE, engine.transform.scaling is None
    if precise:  # else they are scaled means until they are applied
        for piece in engine.gradients():
            if not bool((piece.values == gradient).all()):
                return f"a gradient is {piece.values[0].item():g} instead of {gradient:g}"
    found = engine.step(LR)
    if abs(found / norm - 1) > 1e-3:
        return f"the norm of the gradient is {found:g} instead of {norm:g}"
    for piece in engine.weights():
        # AdamW's first step is as long as the learning rate, whatever the gradient.
        if not bool(((piece.values - (1 - LR)).abs() < 1e-5).all()):
            return f"a weight becomes {piece.values[0].item():g} instead of {1 - LR:g}"
    return ""
