"""The sections of the config but those of the training stages (`stages.py`, `clip.py`).

Sources are sections of the paper (arXiv 2102.12092); "ours" is a choice of this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dalle_dist.choices import (
    Architecture,
    BetweenNodes,
    CommDtype,
    ErrorDtype,
    GuidanceSchedule,
    MaskPattern,
    MaskVariant,
    OuterDtype,
    ProductFormat,
    RankOf,
)
from dalle_dist.config.options import option

HEAD_DIM = 64  # width of an attention head (paper B.1)
MAX_CODES = 2**16  # token shards hold image tokens as uint16


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """Where inputs and results lie; each a local path or `s3://bucket/prefix`."""

    images: str = option("data/images", "folder with train/ and held-out/ image shards")
    tokens: str = option("data/tokens", "folder with train/ and held-out/ token shards")
    tokenizer: str = option("data/tokenizer.json", "file of the text tokenizer")
    dvae_run: str = option("runs/dvae", "run folder of stage 1")
    run: str = option("runs/transformer", "run folder of stage 2")
    clip_run: str = option("runs/clip", "run folder of train-clip")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How samples are read."""

    workers: int = option(
        2,
        "loader processes of each rank, 0 = the rank's own process; the sample order does not "
        "depend on it",
        unit="processes",
        at_least=0,
    )
    streams: int = option(
        0,
        "canonical streams that share out the shards; a rank reads its own alone. A multiple of "
        "every number of ranks that the run may have, for the order of the samples depends on it; "
        "0 = the stage's batch_size",
        unit="streams",
        at_least=0,
    )
    shuffle_shards: int = option(
        2,
        "shards of a stream whose samples are mixed with one another",
        unit="shards",
        at_least=1,
    )
    bad_shards: int = option(
        0,
        "shards that may stay missing or damaged, after they were fetched again, before the run "
        "stops; the samples of others stand in for theirs",
        unit="shards",
        at_least=0,
    )
    cache: str = option(
        "",
        "folder of the cache for what is remote, best on a disk of the node; empty = "
        "$DALLE_DIST_CACHE, else dalle-dist in $XDG_CACHE_HOME or ~/.cache",
        may_be_empty=True,
    )
    cache_gb: float = option(
        100.0,
        "size of that cache on each node; what was used longest ago goes first",
        unit="GB",
        above=0,
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The text tokenizer."""

    kind: str = option(
        "bpe",
        "which text tokenizer; bpe = byte-level BPE, trained here; hugging-face, yttm and rudalle "
        "come with imported models",
    )
    vocab_size: int = option(
        16_384,
        "classes of text tokens, the special ones included",
        unit="classes",
        source="paper 2.2",
        at_least=3,
    )
    bpe_dropout: float = option(
        0.1,
        "BPE dropout: probability of leaving out a merge, in training only",
        source="paper 2.2",
        at_least=0,
        below=1,
    )


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerConfig:
    """What turns images into image tokens for stage 2, and image tokens back into images."""

    kind: str = option(
        "dvae",
        "which image tokenizer; dvae = that of stage 1; others come with imported models",
    )
    path: str = option(
        "",
        "release folder of the image tokenizer; empty = paths.dvae_run/release",
        may_be_empty=True,
    )


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """Network of stage 1, the discrete VAE."""

    image_size: int = option(
        256, "side of the images", unit="pixels", source="paper 2.1", at_least=1
    )
    codebook_size: int = option(
        8_192,
        "classes of image tokens",
        unit="classes",
        source="paper 2.1",
        at_least=2,
        at_most=MAX_CODES,
    )
    width: int = option(
        256,
        "channels of the first group of resblocks, a multiple of 4; each further group doubles "
        "them",
        unit="channels",
        source="OpenAI's released dVAE",
        at_least=4,
    )
    decoder_stem: int = option(
        128,
        "channels after the decoder's first 1x1 convolution",
        unit="channels",
        source="OpenAI's released dVAE",
        at_least=1,
    )
    downsamplings: int = option(
        3,
        "times that the encoder halves the side of the image; there is one group of resblocks "
        "more than that",
        source="paper A.1",
        at_least=0,
        at_most=16,
    )
    blocks_per_group: int = option(
        2, "resblocks of a group", unit="resblocks", source="OpenAI's released dVAE", at_least=1
    )

    @property
    def grid(self) -> int:
        """Image tokens per side of the image."""
        return self.image_size >> self.downsamplings


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Network of stage 2, the sparse transformer."""

    architecture: Architecture = option(
        "paper",
        "whose network; paper = the one of this package, others are those of imported models, "
        "which interop.options describes further",
    )
    layers: int = option(
        64, "layers, of two resblocks each", unit="layers", source="paper 2.3", at_least=1
    )
    width: int = option(
        3_968,
        f"size of the residual stream; must be heads x {HEAD_DIM} in the architecture paper",
        unit="channels",
        source="paper Table 1",
        at_least=1,
    )
    heads: int = option(
        62,
        f"attention heads, of size {HEAD_DIM} in the architecture paper",
        unit="heads",
        source="paper 2.3",
        at_least=1,
    )
    text_tokens: int = option(
        256, "positions of the text", unit="tokens", source="paper 2.2", at_least=1
    )
    image_grid: int = option(
        32, "image tokens per side of the image", unit="tokens", source="paper 2.1", at_least=1
    )
    codebook_size: int = option(
        8_192,
        "classes of image tokens; must be dvae.codebook_size when image_tokenizer.kind is dvae",
        unit="classes",
        source="paper 2.1",
        at_least=2,
        at_most=MAX_CODES,
    )
    conv_kernel: int = option(
        11,
        "side of the window of convolutional attention, odd",
        unit="tokens",
        source="paper B.1",
        at_least=1,
    )
    mask_variant: MaskVariant = option(
        "paper",
        "variant of the attention masks where the paper's text and other programs differ: what "
        "column and convolutional attention see at the edges of the image",
    )
    scale_embeddings: bool = option(
        False,
        "multiply the embeddings by sqrt(width): the stream then starts no smaller than what the "
        "first resblocks add to it, and AdamW moves what a token is as fast as what is made of it",
        source="Vaswani et al. 2017 (arXiv 1706.03762, 3.4); the paper does not say",
    )
    masks: MaskPattern = option(
        "paper",
        "paper = row, column, row, row, ... attention and convolutional in the last layer; "
        "causal = dense causal attention in all layers",
        source="paper 2.3, B.1",
    )

    @property
    def image_tokens(self) -> int:
        """Positions of the image."""
        return self.image_grid**2

    @property
    def tokens(self) -> int:
        """Positions of the sequence: text then image."""
        return self.text_tokens + self.image_tokens


@dataclass(frozen=True, kw_only=True)
class InteropConfig:
    """What an imported model has beyond the section `transformer`."""

    options: dict[str, Any] = option(
        {},
        "the hyper-parameters of the imported model's own program that transformer has no keys "
        "for; empty in the architecture paper",
    )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How image tokens are chosen when images are generated; a release's are its defaults."""

    temperature: float = option(
        1.0, "divides the logits; 0 = always the likeliest token", at_least=0
    )
    top_k: int = option(0, "only this many likeliest tokens; 0 = all", unit="tokens", at_least=0)
    top_p: float = option(
        1.0,
        "only the fewest likeliest tokens that reach this probability",
        above=0,
        at_most=1,
    )
    guidance: float = option(
        1.0,
        "weight w of the caption: the logits are empty + w x (captioned - empty), where empty is "
        "what the model gives for the empty caption; 1 = off, more follows the caption more "
        "closely. For models trained with train.caption_dropout",
        source="Ho & Salimans 2022 (arXiv 2207.12598); the paper has none",
        at_least=0,
    )
    guidance_schedule: GuidanceSchedule = option(
        "constant",
        "guidance from the first image token to the last: constant, or rising from 1 to its value "
        "along a line or half a cosine",
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How nodes work together in stage 2. Inside a node, ZeRO shards by train.zero_stage."""

    between_nodes: BetweenNodes = option(
        "zero",
        "zero = ZeRO over all ranks; dense and powersgd = ZeRO inside each node, and between nodes "
        "the mean of the gradients, whole or compressed by PowerSGD; diloco = ZeRO inside each "
        "node, nodes train apart and average their weights every parallel.outer_every steps",
        source="ours; powersgd: paper 2.5, E; diloco: arXiv 2311.08105",
    )
    local_world_size: int = option(
        0, "ranks that count as a node; 0 = those of one host name", unit="ranks", at_least=0
    )
    rank: int = option(
        896,
        "rank of PowerSGD's factors; the paper has 512, 640 and 896 for 2.8, 5.6 and 12 billion "
        "parameters",
        source="paper Table 1",
        at_least=1,
    )
    rank_of: RankOf = option(
        "node",
        "what parallel.rank counts: node = the sum over the shards of a matrix, which is cut by "
        "rows into one for each rank of a node; shard = each shard, which is a matrix under ZeRO 1 "
        "and 2 and a rank's part of it under ZeRO 3",
    )
    comm_dtype: CommDtype = option(
        "bf16",
        "communication dtype: number format in which PowerSGD's factors P and Q go between nodes; "
        "1-6-9 = sign, exponent and mantissa bits of the paper's 16-bit format",
        source="ours; 1-6-9: paper E",
    )
    p_scale: float = option(
        1.0, "factor on P before it is cast to parallel.comm_dtype", above=0, source="ours"
    )
    q_scale: float = option(
        1.0, "factor on Q before it is cast to parallel.comm_dtype", above=0, source="ours"
    )
    error_dtype: ErrorDtype = option(
        "fp32",
        "number format of PowerSGD's error buffers",
        source="ours; 1-6-9: paper E",
    )
    products: ProductFormat = option(
        "tf32",
        "number format of the factors in PowerSGD's products on GPUs that have it; what it loses "
        "stays in the error buffers",
        source="ours",
    )
    warm_start: bool = option(
        False, "begin each step with the Q of the last one instead of a fixed random one"
    )
    refresh_every: int = option(
        0,
        "before each step that this divides, PowerSGD's Q becomes an orthonormal basis of what the "
        "last step found; helps at 1 and 2 alone, where a fixed Q does not converge; 0 = never",
        unit="steps",
        source="after arXiv 2509.11254",
        at_least=0,
    )
    overlap: bool = option(
        True,
        "with dense and powersgd under ZeRO-3, send gradients between nodes while the backward "
        "pass goes on; False: after it. The result is the same",
        source="ours",
    )
    start_step: int = option(
        0, "PowerSGD averages whole gradients before this step", unit="steps", at_least=0
    )
    dense_every: int = option(
        0,
        "PowerSGD averages whole gradients at every step that this divides; 0 = never",
        unit="steps",
        at_least=0,
    )
    outer_every: int = option(
        50,
        "with diloco, steps that each node makes by itself between two outer steps; a save, a "
        "validation and samples bring one forward",
        unit="steps",
        source="ours; arXiv 2311.08105: 500",
        at_least=1,
    )
    outer_lr: float = option(
        0.7, "learning rate of diloco's outer steps", source="arXiv 2311.08105", above=0
    )
    outer_momentum: float = option(
        0.9,
        "Nesterov momentum of diloco's outer steps",
        source="arXiv 2311.08105",
        at_least=0,
        below=1,
    )
    outer_dtype: OuterDtype = option(
        "bf16",
        "communication dtype of diloco's outer steps; int8 = with one scale for 1,024 values",
        source="ours",
    )
