"""minDALL-E's folder: config.yaml, stage1_last.ckpt, stage2_last.ckpt and tokenizer/.

Ids of the text tokenizer are changed so that the pad is 0 (`with_pad_first`), and so are the rows
that belong to them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

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
from dalle_dist.interop.files import tensors_of
from dalle_dist.interop.imported import Imported
from dalle_dist.interop.names import backwards, layers_of, renamed
from dalle_dist.interop.vqgan_tokenizer import VQGANTokenizer, vqgan_of
from dalle_dist.text_tokenizer.hugging_face import char_bpe, with_pad_first

CONFIG, IMAGES, TRANSFORMER = "config.yaml", "stage1_last.ckpt", "stage2_last.ckpt"
VOCABULARY, MERGES = "tokenizer/bpe-16k-vocab.json", "tokenizer/bpe-16k-merges.txt"
UNKNOWN, PAD = "[UNK]", "[PAD]"
PARTS = "query", "key", "value"
TEXT_ROWS = "tok_emb_txt.weight", "head_txt.weight"
NAMES = [
    ("tok_emb_txt", "text_embedding"),
    ("pos_emb_txt.weight", "text_position"),
    ("tok_emb_img", "image_embedding"),
    ("pos_emb_img.weight", "image_position"),
    ("blocks.#.ln1", "blocks.#.attention.norm"),
    ("blocks.#.attn.qkv", "blocks.#.attention.qkv"),
    ("blocks.#.attn.proj", "blocks.#.attention.out"),
    ("blocks.#.ln2", "blocks.#.mlp.norm"),
    ("blocks.#.mlp.0", "blocks.#.mlp.up"),
    ("blocks.#.mlp.2", "blocks.#.mlp.down"),
    ("ln_f", "norm"),
    ("head_txt.weight", "text_head"),
    ("head_img.weight", "image_head"),
]


def detect(paths: Sequence[Path]) -> bool:
    """See `Peer`."""
    return len(paths) == 1 and (paths[0] / TRANSFORMER).is_file()


def load(paths: Sequence[Path], tokenizer: Path | None = None) -> Imported:
    """The model in a folder.

    Args:
        tokenizer: folder with its vocabulary and merges, if the model's has none.

    Raises:
        CheckpointError: a file is missing, or not as it should be.
        DataError: not such a tokenizer.
    """
    if len(paths) != 1 or not paths[0].is_dir():
        raise CheckpointError(
            f"{' '.join(map(str, paths))}: give minDALL-E's folder, with {CONFIG}, {IMAGES}, "
            f"{TRANSFORMER} and tokenizer/"
        )
    folder = paths[0]
    texts = [(tokenizer or folder / "tokenizer") / Path(name).name for name in (VOCABULARY, MERGES)]
    for file in (folder / CONFIG, folder / IMAGES, folder / TRANSFORMER, *texts):
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file, which minDALL-E's folder has")
    text, pad = with_pad_first(char_bpe(str(texts[0]), str(texts[1]), UNKNOWN, PAD), PAD)
    path = str(folder / TRANSFORMER)
    state = {name: tensor.float() for name, tensor in tensors_of(folder / TRANSFORMER).items()}
    try:
        config = _config(state, _hyper_parameters(folder / CONFIG), pad)
        ours = renamed(_joined(_exchanged(state, pad)), NAMES, path)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: with {CONFIG}, not minDALL-E's stage 2 ({error})") from None
    images = folder / IMAGES
    image_tokenizer = vqgan_of(tensors_of(images), str(images), config.transformer.image_grid)
    return Imported("mindalle", config, image_tokenizer, ours, text)


def export(imported: Imported, path: Path) -> list[Path]:
    """See `Peer`; `path` is the folder.

    Raises ConfigError: not minDALL-E's architecture or tokenizers.
    """
    config, images = imported.config, imported.image_tokenizer
    kinds = config.transformer.architecture, config.image_tokenizer.kind, config.tokenizer.kind
    wanted = "mindalle", VQGANTokenizer.kind, "hugging-face"
    if kinds != wanted or imported.state is None or imported.tokenizer is None:
        raise ConfigError(f"minDALL-E's files cannot hold {kinds}, but only {wanted}")
    pad = config.interop.options["pad"]
    state = _exchanged(_apart(renamed(imported.state, backwards(NAMES), "the model")), pad)
    (path / VOCABULARY).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state}, path / TRANSFORMER)
    torch.save({"state_dict": images.state}, path / IMAGES)
    vocabulary, merges = _tokenizer_files(imported.tokenizer, pad)
    (path / VOCABULARY).write_text(vocabulary)
    (path / MERGES).write_text(merges)
    (path / CONFIG).write_text(yaml.safe_dump(_their_config(config, images.shape), sort_keys=False))
    return [path / name for name in (CONFIG, IMAGES, TRANSFORMER, VOCABULARY, MERGES)]


def _hyper_parameters(path: Path) -> dict[str, Any]:
    """Of stage 2. Raises CheckpointError: of a model that is not computed here."""
    try:
        found = yaml.safe_load(path.read_text())["stage2"]["hparams"]
        found["n_heads"] += 0
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        raise CheckpointError(f"{path}: does not say stage2.hparams.n_heads") from None
    if found.get("gelu_use_approx"):
        raise CheckpointError(f"{path}: stage2.hparams.gelu_use_approx is not computed here")
    return dict(found)


def _config(state: State, found: dict[str, Any], pad: int) -> Config:
    classes, width = state["tok_emb_txt.weight"].shape
    grid = round(len(state["pos_emb_img.weight"]) ** 0.5)
    if grid**2 != len(state["pos_emb_img.weight"]) or width % found["n_heads"]:
        raise ValueError("sizes do not fit one another")
    return Config(
        name="mindalle",
        tokenizer=TokenizerConfig(kind="hugging-face", vocab_size=classes, bpe_dropout=0.0),
        image_tokenizer=ImageTokenizerConfig(kind=VQGANTokenizer.kind),
        transformer=TransformerConfig(
            architecture="mindalle",
            layers=layers_of(state, "blocks."),
            width=width,
            heads=found["n_heads"],
            text_tokens=len(state["pos_emb_txt.weight"]),
            image_grid=grid,
            codebook_size=len(state["tok_emb_img.weight"]),
            masks="causal",
        ),
        interop=InteropConfig(options={"pad": pad}),
        sampling=SamplingConfig(top_k=256),
    )


def _exchanged(state: State, pad: int) -> State:
    """The rows of text classes 0 and `pad` in each other's place: the same there and back."""
    out = dict(state)
    for name in TEXT_ROWS:
        order = torch.arange(len(state[name]))
        order[[0, pad]] = order[[pad, 0]]
        out[name] = state[name][order]
    return out


def _joined(state: State) -> State:
    """Queries, keys and values of a layer in one matrix."""
    out = {name: tensor for name, tensor in state.items() if name.split(".")[-2] not in PARTS}
    for name in state:
        if name.split(".")[-2] == PARTS[0]:
            parts = [state[name.replace(PARTS[0], part)] for part in PARTS]
            out[name.replace(PARTS[0], "qkv")] = torch.cat(parts)
    return out


def _apart(state: State) -> State:
    out = {name: tensor for name, tensor in state.items() if ".qkv." not in name}
    for name in state.keys() - out.keys():
        for part, tensor in zip(PARTS, state[name].chunk(3), strict=True):
            out[name.replace("qkv", part)] = tensor
    return out


def _tokenizer_files(tokenizer: bytes, pad: int) -> tuple[str, str]:
    """(vocabulary, merges) with the program's own ids."""
    model = json.loads(tokenizer)["model"]
    changed = {0: pad, pad: 0}
    vocab = {word: changed.get(i, i) for word, i in model["vocab"].items()}
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    words = json.dumps(dict(sorted(vocab.items(), key=lambda item: item[1])), ensure_ascii=False)
    return words, "".join(f"{line}\n" for line in ["#version: 0.2", *pairs])


def _their_config(config: Config, images: dict[str, Any]) -> dict[str, Any]:
    """config.yaml, as far as the model is told by it."""
    shape = config.transformer
    return {
        "dataset": {
            "tokenizer_type": "CharBPE",
            "context_length": shape.text_tokens,
            "image_resolution": images["image_size"],
        },
        "stage1": {
            "type": "vqgan",
            "embed_dim": images["code_width"],
            "n_embed": images["codebook_size"],
            "hparams": {
                "double_z": False,
                "z_channels": images["latent"],
                "resolution": images["image_size"],
                "in_channels": 3,
                "out_ch": 3,
                "ch": images["width"],
                "ch_mult": list(images["multiples"]),
                "num_res_blocks": images["blocks"],
                "attn_resolutions": [images["image_size"] >> i for i in images["attention"]],
                "pdrop": 0.0,
            },
        },
        "stage2": {
            "type": "transformer1d",
            "vocab_size_txt": config.tokenizer.vocab_size,
            "vocab_size_img": shape.codebook_size,
            "hparams": {
                "embed_dim": shape.width,
                "n_layers": shape.layers,
                "n_heads": shape.heads,
                "n_dense_layers": shape.layers,
                "ctx_len_img": shape.image_tokens,
                "ctx_len_txt": shape.text_tokens,
                "embd_pdrop": 0.0,
                "resid_pdrop": 0.0,
                "attn_pdrop": 0.0,
                "mlp_bias": True,
                "attn_bias": True,
                "gelu_use_approx": False,
                "use_head_txt": True,
                "n_classes": None,
            },
        },
    }
