"""ruDALL-E's files: the transformer's flat state dict, its VQGAN's checkpoint, its `bpe.model`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dalle_dist.checkpoint.formats import State
from dalle_dist.config import (
    Config,
    ImageTokenizerConfig,
    InteropConfig,
    SamplingConfig,
    TokenizerConfig,
    TransformerConfig,
)
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.interop.files import expanded, tensors_of
from dalle_dist.interop.imported import Imported
from dalle_dist.interop.names import backwards, layers_of, renamed
from dalle_dist.interop.rudalle import KERNEL, VARIANTS, dense_mask
from dalle_dist.interop.vqgan_tokenizer import VQGANTokenizer, is_vqgan, vqgan_of
from dalle_dist.text_tokenizer.yttm import RuDALLETokenizer

HEADS = {(24, 2048): 16, (64, 3840): 60}  # of the released sizes, by layers and width
MASKS = {"row": "row", "col": "column", "conv": "conv"}  # their names in the file, and ours
LAYER = "transformer.layers.#"
NAMES = [
    ("text_embeddings", "text_embedding"),
    ("text_pos_embeddings.weight", "text_position"),
    ("image_embeddings", "image_embedding"),
    ("image_row_embeddings.weight", "image_row"),
    ("image_col_embeddings.weight", "image_column"),
    (f"{LAYER}.input_layernorm", "blocks.#.attention.norm"),
    (f"{LAYER}.attention.query_key_value", "blocks.#.attention.qkv"),
    (f"{LAYER}.attention.dense", "blocks.#.attention.out"),
    (f"{LAYER}.before_first_addition_layernorm", "blocks.#.attention.norm_out"),
    (f"{LAYER}.post_attention_layernorm", "blocks.#.mlp.norm"),
    (f"{LAYER}.mlp.dense_h_to_4h", "blocks.#.mlp.up"),
    (f"{LAYER}.mlp.dense_4h_to_h", "blocks.#.mlp.down"),
    (f"{LAYER}.before_second_addition_layernorm", "blocks.#.mlp.norm_out"),
    ("transformer.final_layernorm", "norm"),
    ("to_logits.0", "second_norm"),
    ("to_logits.1", "unembedding"),
]


def detect(paths: Sequence[Path]) -> bool:
    """See `Peer`."""
    return any(_is_transformer(tensors_of(path)) for path in expanded(paths))


def load(
    paths: Sequence[Path],
    tokenizer: Path | None = None,
    heads: int | None = None,
    version: int | None = None,
) -> Imported:
    """The model in these files, or in the files of a folder.

    Args:
        tokenizer: `bpe.model`, if it is not among them.
        heads: of attention; None: those of the released size.
        version: of the program, 2 or 3; None: what the masks in the file say, or its name.

    Raises:
        CheckpointError: a file is missing, or not as it should be.
        DataError: not such a tokenizer.
    """
    files = {path: tensors_of(path) for path in expanded(paths)}
    found = [path for path, state in files.items() if _is_transformer(state)]
    images = [path for path, state in files.items() if is_vqgan(state)]
    models = [path for path in files if path.name.endswith("bpe.model")]
    texts = models if tokenizer is None else [tokenizer]
    for kind, candidates, example in (
        ("transformer", found, "pytorch_model_v3.bin"),
        ("image tokenizer", images, "vqgan.gumbelf8-sber.model.ckpt"),
        ("text tokenizer", texts, "bpe.model"),
    ):
        if len(candidates) != 1:
            raise CheckpointError(
                f"{' '.join(map(str, paths))}: {len(candidates)} files hold its {kind}; "
                f"give one, as {example}"
            )
    (path,), (image,), (text,) = found, images, texts
    RuDALLETokenizer.load(str(text))
    state = {name: tensor.float() for name, tensor in files[path].items()}
    config = _config(state, str(path), heads, version)
    weights = {name: tensor for name, tensor in state.items() if not name.endswith("_mask")}
    image_tokenizer = vqgan_of(files[image], str(image), config.transformer.image_grid)
    return Imported(
        "rudalle", config, image_tokenizer, renamed(weights, NAMES, str(path)), text.read_bytes()
    )


def export(imported: Imported, path: Path) -> list[Path]:
    """See `Peer`; the files are those of one folder.

    Raises ConfigError: not ruDALL-E's architecture or tokenizers.
    """
    config = imported.config
    version = config.interop.options.get("version")
    kinds = config.transformer.architecture, config.image_tokenizer.kind, config.tokenizer.kind
    wanted = "rudalle", VQGANTokenizer.kind, "rudalle"
    if kinds != wanted or imported.state is None or imported.tokenizer is None:
        raise ConfigError(f"ruDALL-E's files cannot hold {kinds}, but only {wanted}")
    shape = config.transformer
    state = renamed(imported.state, backwards(NAMES), "the model") | {
        f"transformer.{name}_mask": _mask(kind, shape.text_tokens, shape.image_grid, version)
        for name, kind in MASKS.items()
    }
    files = [
        path / f"pytorch_model_v{version}.bin",
        path / "vqgan.gumbelf8-sber.model.ckpt",
        path / "bpe.model",
    ]
    path.mkdir(parents=True, exist_ok=True)
    torch.save(state, files[0])
    torch.save({"state_dict": imported.image_tokenizer.state}, files[1])
    files[2].write_bytes(imported.tokenizer)
    return files


def _is_transformer(state: State) -> bool:
    return "text_pos_embeddings.weight" in state and "to_logits.1.weight" in state


def _config(state: State, path: str, heads: int | None, version: int | None) -> Config:
    try:
        return _config_of(state, path, heads, version)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not a transformer of ruDALL-E ({error})") from None


def _config_of(state: State, path: str, heads: int | None, version: int | None) -> Config:
    classes, width = state["text_embeddings.weight"].shape
    codes, _ = state["image_embeddings.weight"].shape
    text, grid = (
        len(state["text_pos_embeddings.weight"]) - 1,
        len(state["image_row_embeddings.weight"]),
    )
    layers = layers_of(state, "transformer.layers.")
    heads = heads or HEADS.get((layers, width))
    if heads is None or width % heads:
        raise CheckpointError(
            f"{path}: {heads or 'unknown'} heads of attention for {layers} layers of width "
            f"{width}, not a released size; say how many there are (heads)"
        )
    version = _version(state, path, text, grid, version)
    return Config(
        name="rudalle",
        tokenizer=TokenizerConfig(kind="rudalle", vocab_size=classes - text),
        image_tokenizer=ImageTokenizerConfig(kind=VQGANTokenizer.kind),
        transformer=TransformerConfig(
            architecture="rudalle",
            layers=layers,
            width=width,
            heads=heads,
            text_tokens=text,
            image_grid=grid,
            codebook_size=codes,
            conv_kernel=KERNEL,
            mask_variant=VARIANTS[version],
        ),
        interop=InteropConfig(options={"version": version}),
        sampling=SamplingConfig(top_k=2048, top_p=0.995),
    )


def _version(state: State, path: str, text: int, grid: int, said: int | None) -> int:
    """Of the program, which no weight tells: the convolutional mask does, or the file's name."""
    if (mask := state.get("transformer.conv_mask")) is not None:
        fits = [number for number in VARIANTS if _same(mask, _mask("conv", text, grid, number))]
    else:
        name = re.search(r"_v([23])\b", Path(path).name)
        fits = [int(name[1])] if name else []
    if said in VARIANTS and (said in fits or mask is None):
        return said
    if len(fits) != 1 or said is not None:
        raise CheckpointError(
            f"{path}: fits {fits or 'no'} version of ruDALL-E's program; say which it is, 2 or 3 "
            "(version)"
        )
    return fits[0]


def _mask(kind: str, text: int, grid: int, version: Any) -> torch.Tensor:
    return dense_mask(kind, text, grid, VARIANTS[version]).float()


def _same(mask: torch.Tensor, other: torch.Tensor) -> bool:
    return mask.shape == other.shape and torch.equal(mask, other)
