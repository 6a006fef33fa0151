"""The sections of train-clip.

Sources are places in the paper of CLIP (Radford et al. 2021); "ours" is a choice of this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dalle_dist.choices import ZeROStage
from dalle_dist.config.options import option
from dalle_dist.config.stage import StageConfig, shared

CLIP = "arXiv 2103.00020"


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Networks of the CLIP that train-clip trains; the defaults are those of ViT-B/32."""

    image_size: int = option(
        224, "side of the images", unit="pixels", source=f"{CLIP} Table 20", at_least=1
    )
    patch_size: int = option(
        32, "side of a patch; must divide image_size", unit="pixels", source=CLIP, at_least=1
    )
    image_layers: int = option(
        12, "layers of the image encoder", unit="layers", source=f"{CLIP} Table 20", at_least=1
    )
    image_width: int = option(
        768,
        "width of the image encoder, a multiple of image_heads",
        unit="channels",
        source=f"{CLIP} Table 20",
        at_least=1,
    )
    image_heads: int = option(
        12,
        "attention heads of the image encoder",
        unit="heads",
        source=f"{CLIP} Table 20",
        at_least=1,
    )
    text_tokens: int = option(
        77,
        "positions of the text encoder, the end-of-text token included; longer captions are cut",
        unit="tokens",
        source="OpenAI's released CLIP",
        at_least=2,
    )
    text_layers: int = option(
        12, "layers of the text encoder", unit="layers", source=f"{CLIP} Table 20", at_least=1
    )
    text_width: int = option(
        512,
        "width of the text encoder, a multiple of text_heads",
        unit="channels",
        source=f"{CLIP} Table 20",
        at_least=1,
    )
    text_heads: int = option(
        8,
        "attention heads of the text encoder",
        unit="heads",
        source=f"{CLIP} Table 20",
        at_least=1,
    )
    features: int = option(
        512,
        "size of the features in which images and captions are compared",
        unit="channels",
        source=f"{CLIP} Table 20",
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class CLIPTrainConfig(StageConfig):
    """Training of a CLIP; the defaults are those of the published ViT-B/32."""

    section: ClassVar[str] = "clip_train"

    steps: int = shared("steps", 390_625, f"{CLIP} 2.5: 32 epochs of 400 million pairs")
    batch_size: int = shared("batch_size", 32_768, f"{CLIP} 2.5")
    # Not split by default: pairs of other micro-batches are no negatives.
    micro_batch: int = shared("micro_batch", 0)
    lr: float = shared("lr", 5e-4, f"{CLIP} Table 20")
    lr_final: float = option(
        0.0,
        "learning rate at lr_steps and after; half a cosine leads there",
        source=f"{CLIP} 2.5",
        at_least=0,
    )
    lr_steps: int = option(
        390_625,
        "steps over which lr falls to lr_final",
        unit="steps",
        source=f"{CLIP} 2.5",
        at_least=0,
    )
    warmup: int = shared("warmup", 2_000, f"{CLIP} Table 18")
    beta1: float = shared("beta1", 0.9, f"{CLIP} Table 18")
    beta2: float = shared("beta2", 0.98, f"{CLIP} Table 18")
    eps: float = shared("eps", 1e-6, f"{CLIP} Table 18")
    weight_decay: float = shared("weight_decay", 0.2, f"{CLIP} Table 18")
    clip: float = shared("clip", 0.0, f"{CLIP} names none")
    ema: float = shared("ema", 0.999)
    ema_every: int = shared("ema_every", 1)
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "auto = bf16 autocast where the hardware computes in bf16, else fp32"
    )
    zero_stage: ZeROStage = shared("zero_stage", 0)
    deepspeed: dict[str, Any] = shared("deepspeed", {})
    augment: bool = option(True, "crop at random; images are not mirrored", source=f"{CLIP} 2.4")
    crop_min: float = option(
        1.0,
        "the image is resized to between crop_min and crop_max times clip.image_size, before a "
        "square of clip.image_size is cut out",
        source=f"{CLIP} 2.4",
        at_least=1,
    )
    crop_max: float = option(
        1.0, "see crop_min; at least crop_min", source=f"{CLIP} 2.4", at_least=1
    )
    log_every: int = shared("log_every", 50)
    eval_every: int = shared("eval_every", 5_000)
    sample_every: int = shared("sample_every", 5_000)
    save_every: int = shared("save_every", 5_000)
    keep: int = shared("keep", 2)
    wandb: bool = shared("wandb", False)
