"""The sections of the two training stages.

Sources are sections of the paper (arXiv 2102.12092); "ours" is a choice of this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dalle_dist.choices import Precision, ZeROStage
from dalle_dist.config.options import option
from dalle_dist.config.stage import StageConfig, shared


@dataclass(frozen=True, kw_only=True)
class DVAETrainConfig(StageConfig):
    """Stage 1: training of the discrete VAE."""

    section: ClassVar[str] = "dvae_train"

    steps: int = shared("steps", 3_000_000, "paper A.2")
    batch_size: int = shared("batch_size", 512, "paper A.2")
    micro_batch: int = shared("micro_batch", 0)
    lr: float = shared("lr", 1e-4, "paper A.2")
    lr_final: float = option(
        1.25e-6,
        "learning rate at lr_steps and after; half a cosine leads there",
        source="paper A.2",
        at_least=0,
    )
    lr_steps: int = option(
        1_200_000,
        "steps over which lr falls to lr_final",
        unit="steps",
        source="paper A.2",
        at_least=0,
    )
    warmup: int = shared("warmup", 0, "paper A.2 names none")
    temperature: float = option(
        1.0, "temperature of the relaxation at the start", source="paper A.2", above=0
    )
    temperature_final: float = option(
        1 / 16, "temperature at temperature_steps and after", source="paper A.2", above=0
    )
    temperature_steps: int = option(
        150_000,
        "steps over which temperature falls to temperature_final",
        unit="steps",
        source="paper A.2",
        at_least=0,
    )
    kl_weight: float = option(
        6.6, "weight of the KL term at kl_steps and after", source="paper 2.1, A.2", at_least=0
    )
    kl_steps: int = option(
        5_000,
        "steps over which the weight of the KL term rises from 0",
        unit="steps",
        source="paper A.2",
        at_least=0,
    )
    nll_beta: float = option(
        0.0,
        "power of the likelihood's scale b by which each pixel's gradient is multiplied; 0 = the "
        "paper's likelihood, which gives hard pixels up for plain ones; 1 = all pull alike",
        source="beta-NLL, arXiv 2203.09168",
        at_least=0,
        at_most=1,
    )
    beta1: float = shared("beta1", 0.9, "paper A.2")
    beta2: float = shared("beta2", 0.999, "paper A.2")
    eps: float = shared("eps", 1e-8, "paper A.2")
    weight_decay: float = shared("weight_decay", 1e-4, "paper A.2")
    clip: float = shared("clip", 0.0, "paper A.2 names none")
    ema: float = shared("ema", 0.999, "paper A.2")
    ema_every: int = shared("ema_every", 1)
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "auto = bf16 autocast where the hardware computes in bf16, else fp32"
    )
    zero_stage: ZeROStage = shared("zero_stage", 0)
    deepspeed: dict[str, Any] = shared("deepspeed", {})
    augment: bool = option(
        True, "crop at random, and mirror if flip says so", source="paper Listing 1"
    )
    crop_min: float = option(
        9 / 8,
        "the image is resized to between crop_min and crop_max times dvae.image_size, before a "
        "square of dvae.image_size is cut out",
        source="paper Listing 1",
        at_least=1,
    )
    crop_max: float = option(
        12 / 8, "see crop_min; at least crop_min", source="paper Listing 1", at_least=1
    )
    flip: bool = option(True, "mirror half of the images", source="paper Listing 1")
    log_every: int = shared("log_every", 50)
    eval_every: int = shared("eval_every", 5_000)
    sample_every: int = shared("sample_every", 5_000)
    save_every: int = shared("save_every", 5_000)
    keep: int = shared("keep", 2)
    wandb: bool = shared("wandb", False)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StageConfig):
    """Stage 2: training of the transformer."""

    section: ClassVar[str] = "train"

    steps: int = shared("steps", 430_000, "paper B.2")
    batch_size: int = shared("batch_size", 1_024, "paper B.2")
    micro_batch: int = shared("micro_batch", 1)
    lr: float = shared("lr", 4.5e-4, "paper B.2")
    warmup: int = shared("warmup", 5_000, "paper B.2")
    halvings: int = option(
        5,
        "times that the learning rate is halved at most; it ends at lr / 2**halvings",
        source="paper B.2",
        at_least=0,
    )
    halve_at: list[int] = option(
        [],
        "steps at which the learning rate is halved; empty = at plateaus of the training loss",
        unit="steps",
        at_least=1,
    )
    plateau_window: int = option(
        5_000,
        "steps over which the training loss is averaged to find plateaus",
        unit="steps",
        at_least=1,
    )
    plateau_gain: float = option(
        0.002,
        "share by which that average must fall from one window to the next; less is a plateau",
        at_least=0,
        below=1,
    )
    beta1: float = shared("beta1", 0.9, "paper B.2")
    beta2: float = shared("beta2", 0.96, "paper B.2")
    eps: float = shared("eps", 1e-8, "paper B.2")
    weight_decay: float = shared("weight_decay", 4.5e-2, "paper B.2")
    clip: float = shared("clip", 4.0, "paper B.2")
    ema: float = shared("ema", 0.99, "paper B.2")
    ema_every: int = shared("ema_every", 25, "paper B.2")
    text_loss: float = option(
        1 / 8,
        "share of the text in the loss; the image's is 1 - text_loss",
        source="paper 2.2",
        at_least=0,
        below=1,
    )
    caption_dropout: float = option(
        0.0,
        "probability that a training sample has the empty caption instead of its own; above 0, "
        "images can be generated with guidance (sampling.guidance)",
        source="Ho & Salimans 2022 (arXiv 2207.12598); the paper has none",
        at_least=0,
        below=1,
    )
    image_noise: float = option(
        0.0,
        "largest share of the image tokens that the model sees replaced by random ones in "
        "training; each sample's own share is uniform between 0 and this. The model then leans on "
        "the caption, and learns to go on from its own mistakes",
        source="ours; the paper has none",
        at_least=0,
        at_most=1,
    )
    precision: Precision = option(
        "bf16",
        "number format of training; fp16 = with a gradient scale per resblock, on fp32 parameters; "
        "auto = bf16 where the hardware computes in bf16, else fp32",
        source="ours; fp16: paper 2.4",
    )
    variance_clip: float = shared("variance_clip", 5.0, "paper B.2")
    checkpoint_activations: bool = option(
        True,
        "compute the activations of a layer again in the backward pass, to save memory",
        source="paper 2.4",
    )
    zero_stage: ZeROStage = shared("zero_stage", 2)
    deepspeed: dict[str, Any] = shared("deepspeed", {})
    log_every: int = shared("log_every", 10)
    eval_every: int = shared("eval_every", 1_000)
    sample_every: int = shared("sample_every", 1_000)
    save_every: int = shared("save_every", 1_000)
    keep: int = shared("keep", 2)
    metrics: list[str] = option(
        ["losses"],
        "measures at each evaluation; losses = of text and image tokens, caption_gain = what the "
        "right captions are worth in image loss, identification = how often an image sampled for a "
        "held-out caption is nearest to that caption's true image, completion = how often an image "
        "completed below its first rows is its own there",
    )
    completion_rows: int = option(
        0,
        "rows of image tokens that the measure completion is given; 0 = the upper half",
        unit="rows",
        source="paper 3.3: 15 of 32",
        at_least=0,
    )
    prompts: list[str] = option([], "captions of the sample images")
    samples_per_prompt: int = option(4, "sample images of each prompt", unit="images", at_least=1)
    wandb: bool = shared("wandb", False)
