"""What the sections of all training stages have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dalle_dist.choices import AdamWBackend, EMAPlace, Moments, Precision, Skip, ZeROStage
from dalle_dist.config.options import inherited, option, required


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What all training stages have; each gives its own defaults."""

    section: ClassVar[str]  # name of the section, for errors

    steps: int = required("optimizer steps of the run", unit="steps", at_least=1)
    batch_size: int = required(
        "samples of an optimizer step, over all ranks and micro-batches", unit="samples", at_least=1
    )
    micro_batch: int = required(
        "samples of a rank's backward pass; 0 = batch_size / ranks", unit="samples", at_least=0
    )
    lr: float = required("highest learning rate", above=0)
    warmup: int = required(
        "steps over which the learning rate rises from 0", unit="steps", at_least=0
    )
    beta1: float = required("AdamW: decay of the first moment", at_least=0, below=1)
    beta2: float = required("AdamW: decay of the second moment", at_least=0, below=1)
    eps: float = required("AdamW: added to the root of the second moment", above=0)
    weight_decay: float = required("AdamW: decoupled weight decay", at_least=0)
    clip: float = required("largest norm of the gradient; 0 = not clipped", at_least=0)
    ema: float = required(
        "decay of the moving average of the weights, at each of its updates", at_least=0, below=1
    )
    ema_every: int = required(
        "steps between two updates of the moving average", unit="steps", at_least=1
    )
    ema_on: EMAPlace = option(
        "device",
        "where a rank keeps its share of the moving average: device = beside the weights, which "
        "takes 4 bytes a parameter over all ranks together; host = in main memory, for a GPU that "
        "holds a large model alone",
    )
    precision: Precision = required("number format of training")
    zero_stage: ZeROStage = required(
        "ZeRO stage: what DeepSpeed shards over ranks; 0 = nothing, 1 = optimizer state, "
        "2 = gradients too, 3 = parameters too"
    )
    deepspeed: dict[str, Any] = required(
        "further settings of DeepSpeed, as keys or as the path of a JSON file with them, which is "
        "read when the config is loaded; what contradicts this config is refused",
    )
    log_every: int = required("steps between two lines of the log", unit="steps", at_least=1)
    eval_every: int = required(
        "steps between two evaluations on held-out samples", unit="steps", at_least=1
    )
    sample_every: int = required(
        "steps between two sheets of sample images; 0 = none, for a model that is too large to "
        "draw while all its ranks wait: dalle-dist samples --follow RUN does it beside them",
        unit="steps",
        at_least=0,
    )
    save_every: int = required("steps between two checkpoints", unit="steps", at_least=1)
    keep: int = required("newest checkpoints that are kept", unit="checkpoints", at_least=1)
    keep_every: int = option(
        0,
        "checkpoints of steps that this divides are kept too; 0 = none",
        unit="steps",
        at_least=0,
    )
    init: str = option(
        "",
        "release folder, or its file of weights, that a new run starts from; empty: random weights",
        may_be_empty=True,
    )
    wandb: bool = required("log to Weights & Biases too")
    skip: Skip = option(
        "step",
        "fp16, and means between nodes: what a resblock with gradients that are not finite loses: "
        "the whole optimizer step, or its own part of it",
        source="paper 2.4",
    )
    skip_budget: int = option(
        10,
        "steps whose loss is not finite that a run may skip; each is logged with its samples, and "
        "one more ends the run",
        unit="steps",
        at_least=0,
    )
    moments: Moments = option(
        "fp32",
        "number format of AdamW's moments of the parameters with weight decay; all others are fp32",
        source="ours; 16-bit: paper D",
    )
    variance_clip: float = option(
        0.0,
        "largest second moment, clipped before AdamW uses it; 0 = not clipped",
        at_least=0,
    )
    adamw_backend: AdamWBackend = option(
        "auto",
        "AdamW by torch's operations, in one Triton pass, or by NVIDIA's apex, which also brings "
        "its layer norm; auto = triton on GPUs, torch on CPUs",
    )
    compile: bool = option(False, "torch.compile the inside of each resblock of the transformer")


def shared(name: str, default: Any, source: str = "ours") -> Any:
    """A field of StageConfig with a stage's own default, and where that is from."""
    return inherited(StageConfig, name, default, source)
