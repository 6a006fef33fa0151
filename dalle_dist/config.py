"""The one source of truth of a run: nested, typed, frozen dataclasses <-> YAML.

`load("emoji", ["train.steps=100"])` reads a preset or a YAML file and applies overrides. Every
error names the key, the value found and what is allowed. Sources in the paper: dVAE A.1-A.3,
transformer 2.2-2.3 and B.2 (arXiv 2102.12092).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from dalle_dist.errors import ConfigError

HEAD_DIM = 64
MASK_DIALECTS = ("paper", "clamp", "torus", "dalle-pytorch")

Precision = Literal["fp16", "bf16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """Where things lie; each a local path or `s3://bucket/prefix`."""

    images: str = "data/images"  # folder with train/ and held-out/ image shards
    tokens: str = "data/tokens"  # folder with train/ and held-out/ token shards
    tokenizer: str = "data/tokenizer.json"
    dvae_run: str = "runs/dvae"
    run: str = "runs/transformer"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    workers: int = 2  # loader processes per rank; the sample order does not depend on it
    shuffle_shards: int = 16  # shards whose samples are mixed with one another


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    vocab_size: int = 16_384
    dropout: float = 0.1  # BPE dropout, training only (paper 2.2)


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    image_size: int = 256  # pixels
    codebook_size: int = 8_192
    width: int = 256  # channels of the first group; each further group doubles them
    decoder_stem: int = 128  # channels after the decoder's first 1x1 convolution
    downsamplings: int = 3  # factor 2 each; one group of resblocks more than that
    blocks_per_group: int = 2

    @property
    def grid(self) -> int:
        """Codes per side of the image."""
        return self.image_size >> self.downsamplings


@dataclass(frozen=True, kw_only=True)
class DVAETrainConfig:
    batch_size: int = 512  # over all ranks
    updates: int = 3_000_000
    lr: float = 1e-4
    lr_final: float = 1.25e-6
    lr_steps: int = 1_200_000
    warmup: int = 0
    temperature: float = 1.0
    temperature_final: float = 1 / 16
    temperature_steps: int = 150_000
    kl_weight: float = 6.6
    kl_steps: int = 5_000
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-4
    clip: float = 0.0  # gradient norm; 0 = off, as in the paper
    ema: float = 0.999
    # "auto": bf16 autocast where the hardware computes in bf16, else fp32
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    augment: bool = True
    crop_min: float = 9 / 8  # the picture is resized to [crop_min, crop_max] x image_size ...
    crop_max: float = 12 / 8  # ... and a square of image_size is cut out (paper, Listing 1)
    flip: bool = True
    log_every: int = 50
    eval_every: int = 5_000
    save_every: int = 5_000
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    layers: int = 64
    width: int = 3_968
    heads: int = 62
    text_tokens: int = 256
    image_grid: int = 32
    conv_kernel: int = 11
    mask_variant: Literal["paper", "clamp", "torus", "dalle-pytorch"] = "paper"
    masks: Literal["paper", "causal"] = "paper"  # row, column, row, row, ... conv last | all dense

    @property
    def image_tokens(self) -> int:
        return self.image_grid**2

    @property
    def tokens(self) -> int:
        """States of the sequence: text then image."""
        return self.text_tokens + self.image_tokens


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    batch_size: int = 1_024  # over all ranks and accumulation steps
    micro_batch: int = 1  # per rank and backward pass
    updates: int = 430_000
    lr: float = 4.5e-4
    warmup: int = 5_000
    halvings: int = 5  # at most this many; the rate ends at lr / 2**halvings
    halve_at: list[int] = field(default_factory=list)  # updates; empty = at plateaus of the loss
    plateau_window: int = 5_000  # updates over which the training loss is averaged ...
    plateau_gain: float = 0.002  # ... and must fall by this share from one window to the next
    beta1: float = 0.9
    beta2: float = 0.96
    eps: float = 1e-8
    weight_decay: float = 4.5e-2
    clip: float = 4.0
    ema: float = 0.99
    ema_every: int = 25
    text_loss: float = 1 / 8  # the image's share is 1 - text_loss (paper 2.2)
    # "fp16": a gradient scale per resblock, on fp32 parameters (paper 2.4); "bf16", "fp32": none
    precision: Precision = "bf16"
    # fp16: a resblock with gradients that are not finite costs the whole update, or its own part
    skip: Literal["update", "block"] = "update"
    moments: Literal["fp32", "16-bit"] = "fp32"  # of the resblocks' matrices; all others: fp32
    variance_clip: float = 5.0  # largest second moment, before it is used (paper B.2); 0 = none
    # AdamW by torch, one Triton pass, or NVIDIA's apex, which also brings its layer norm; "auto":
    # Triton on GPUs, torch on CPUs
    optimizer: Literal["auto", "torch", "triton", "apex"] = "auto"
    compile: bool = False  # torch.compile the inside of each resblock
    checkpoint_activations: bool = True
    deepspeed: str = "ds_configs/zero2.json"
    log_every: int = 10
    eval_every: int = 1_000
    sample_every: int = 1_000
    save_every: int = 1_000
    keep: int = 2
    prompts: list[str] = field(default_factory=list)
    samples_per_prompt: int = 4
    wandb: bool = False


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How machines work together. Inside one, ZeRO shards as the file at train.deepspeed says."""

    # "zero": ZeRO over all ranks; "dense" and "powersgd": ZeRO inside each machine, and between
    # machines the mean of the gradients, whole or compressed (paper 2.5 and E)
    between_nodes: Literal["zero", "dense", "powersgd"] = "zero"
    local_world_size: int = 0  # ranks that count as a machine; 0 = those of one host name
    rank: int = 896  # of PowerSGD (paper, Table 1: 512, 640, 896 for 2.8, 5.6 and 12 billion)
    # "machine": the sum over the shards of a matrix, which is cut by rows into local_world_size of them;
    # "shard": of each shard, a matrix under ZeRO-1 and 2, local_world_size parts of it under ZeRO-3
    rank_of: Literal["machine", "shard"] = "machine"
    wire: Literal["fp32", "bf16", "fp16", "1-6-9"] = "bf16"  # number format of P and Q
    p_scale: float = 1.0  # what P and Q are multiplied by, to lie well in that format
    q_scale: float = 1.0
    errors: Literal["fp32", "1-6-9"] = "fp32"  # number format of the error buffers
    warm_start: bool = False  # the last Q for the next, instead of a fixed one
    start_step: int = 0  # average whole gradients before this update
    dense_every: int = 0  # average whole gradients at each such update; 0 = never


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "custom"
    seed: int = 0
    paths: PathsConfig = field(default_factory=PathsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    dvae: DVAEConfig = field(default_factory=DVAEConfig)
    dvae_train: DVAETrainConfig = field(default_factory=DVAETrainConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        validate(self)


def validate(config: Config) -> None:
    """Sizes that do not fit one another. Raises ConfigError."""
    t, d, train, dvae_train = config.transformer, config.dvae, config.train, config.dvae_train
    _positive(t, "transformer", "layers", "width", "heads", "text_tokens", "image_grid")
    _positive(d, "dvae", "image_size", "codebook_size", "width", "decoder_stem")
    _positive(d, "dvae", "blocks_per_group")
    _positive(train, "train", "batch_size", "micro_batch", "updates", "log_every", "save_every")
    _positive(train, "train", "eval_every", "sample_every", "ema_every", "keep")
    _positive(dvae_train, "dvae_train", "batch_size", "updates", "log_every", "eval_every")
    _positive(dvae_train, "dvae_train", "save_every", "keep")
    _require(
        t.heads * HEAD_DIM == t.width,
        f"transformer.width: {t.width} is not transformer.heads x {HEAD_DIM} "
        f"= {t.heads * HEAD_DIM}",
    )
    _require(
        d.image_size == d.grid << d.downsamplings and d.grid > 0,
        f"dvae.image_size: {d.image_size} is not a multiple of 2**dvae.downsamplings = "
        f"{2**d.downsamplings}",
    )
    _require(d.width % 4 == 0, f"dvae.width: {d.width} is not a multiple of 4")
    _require(
        d.codebook_size <= 2**16, f"dvae.codebook_size: {d.codebook_size} is above 65,536 (uint16)"
    )
    _require(
        t.image_grid == d.grid,
        f"transformer.image_grid: {t.image_grid}, but the dVAE gives {d.grid} "
        f"(dvae.image_size {d.image_size} / 2**{d.downsamplings})",
    )
    _require(t.conv_kernel % 2 == 1, f"transformer.conv_kernel: {t.conv_kernel} is not odd")
    _require(
        train.batch_size % train.micro_batch == 0,
        f"train.batch_size: {train.batch_size} is not a multiple of train.micro_batch "
        f"{train.micro_batch}",
    )
    _positive(config.parallel, "parallel", "rank", "p_scale", "q_scale")
    for name, share in (("train.text_loss", train.text_loss), ("train.ema", train.ema)):
        _require(0 <= share < 1, f"{name}: {share} is not in [0, 1)")
    _require(
        0 <= config.tokenizer.dropout < 1,
        f"tokenizer.dropout: {config.tokenizer.dropout} is not in [0, 1)",
    )
    _require(
        1 <= dvae_train.crop_min <= dvae_train.crop_max,
        f"dvae_train.crop_min: {dvae_train.crop_min} is not in [1, dvae_train.crop_max]",
    )


def load(source: str, overrides: list[str] | None = None) -> Config:
    """Preset name or path of a YAML file, then `key.sub=value` overrides, to a checked Config.

    Raises:
        ConfigError: no such preset or file; unknown key; wrong type; sizes that do not fit.
    """
    tree = _read(source)
    for override in overrides or []:
        _override(tree, override)
    return from_dict(tree)


def from_dict(tree: dict[str, Any]) -> Config:
    """Nested dict to a checked Config. Raises ConfigError."""
    return typing.cast(Config, _build(Config, tree, ""))


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dict of plain YAML types; `from_dict` of it gives an equal Config."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def preset_names() -> list[str]:
    folder = resources.files("dalle_dist.presets")
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def difference(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """Readable lines `key: ours -> theirs` for all leaves in which two nested dicts differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(ours.keys() | theirs.keys())
        absent = "(absent)"
        parts = (
            difference(ours.get(k, absent), theirs.get(k, absent), f"{prefix}{k}.") for k in keys
        )
        return [line for lines in parts for line in lines]
    return [] if ours == theirs else [f"{prefix.rstrip('.')}: {ours} -> {theirs}"]


def _read(source: str) -> dict[str, Any]:
    preset = resources.files("dalle_dist.presets") / f"{source}.yaml"
    if source in preset_names():
        text = preset.read_text()
    elif Path(source).is_file():
        text = Path(source).read_text()
    else:
        raise ConfigError(
            f"no preset or file '{source}'; presets: {', '.join(preset_names())}"
            f"{_did_you_mean(source, preset_names())}"
        )
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: not a mapping of keys to values")
    return tree


def _override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"'{override}' is not of the form key=value")
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: '{parent}' is not a section")
    try:
        tree[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: '{text}' is not a YAML value") from None


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix.rstrip('.')}: {tree!r} is not a section with keys")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise ConfigError(f"unknown key '{prefix}{key}'{_did_you_mean(str(key), list(hints))}")
    return cls(**{key: _convert(hints[key], value, prefix + key) for key, value in tree.items()})


def _convert(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, f"{key}.")
    origin = typing.get_origin(kind)
    if origin is Literal:
        allowed = typing.get_args(kind)
        if value not in allowed:
            raise ConfigError(f"{key}: {value!r} is not one of {', '.join(map(str, allowed))}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{key}: {value!r} is not a list")
        (item,) = typing.get_args(kind)
        return [_convert(item, entry, f"{key}[{i}]") for i, entry in enumerate(value)]
    return _scalar(kind, value, key)


def _scalar(kind: type | types.UnionType, value: Any, key: str) -> Any:
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 as text, and fractions such as 1/16 read better than decimals.
        try:
            top, _, bottom = value.partition("/")
            return float(top) / float(bottom or 1)
        except (ValueError, ZeroDivisionError):
            pass
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, typing.cast(type, kind)) and (kind is bool or not isinstance(value, bool)):
        return value
    name = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    raise ConfigError(f"{key}: {value!r} is not {name[typing.cast(type, kind)]}")


def _positive(section: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(value > 0, f"{prefix}.{name}: {value} is not positive")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _did_you_mean(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
