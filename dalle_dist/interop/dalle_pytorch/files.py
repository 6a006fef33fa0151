"""`dalle.pt` and `vae.pt` of DALLE-pytorch, to an `Imported` and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dalle_dist.checkpoint.formats import State
from dalle_dist.config import (
    Config,
    ImageTokenizerConfig,
    InteropConfig,
    TokenizerConfig,
    TrainConfig,
    TransformerConfig,
)
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.interop import openai_dvae
from dalle_dist.interop.dalle_pytorch import names
from dalle_dist.interop.dalle_pytorch.model import OPTIONS
from dalle_dist.interop.dalle_pytorch.text import text_tokenizer
from dalle_dist.interop.dalle_pytorch.vae import HPARAMS, imported_vae
from dalle_dist.interop.imported import Imported, ImportedTokenizer
from dalle_dist.interop.names import layers_of
from dalle_dist.interop.pickles import read_pickle, tensors_of
from dalle_dist.interop.vqgan_tokenizer import vqgan_of

PEER, VERSION = "dalle-pytorch", "1.6.6"
_SIZE = 256  # pixels; the program knows no other for tokenizers that it did not train
_VAE, _VQGAN = "vae.", "model."


def detect(paths: Sequence[Path]) -> bool:
    """One file with hyper-parameters and weights."""
    if len(paths) != 1 or not paths[0].is_file():
        return False
    try:
        tree = read_pickle(paths[0])
    except CheckpointError:
        return False
    return isinstance(tree, dict) and {"hparams", "weights"} <= tree.keys()


def load(paths: Sequence[Path], tokenizer: Path | None = None) -> Imported:
    """A `dalle.pt` with the file of its text tokenizer, or a `vae.pt`.

    Raises:
        CheckpointError: not such a file, or of a model that is not known here.
        ConfigError: hyper-parameters that are not known here.
        DataError: not a text tokenizer.
    """
    (path,) = paths
    try:
        return _imported(read_pickle(path), tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def export(imported: Imported, path: Path) -> list[Path]:
    """Write `path`, a `dalle.pt` or, of an image tokenizer alone, a `vae.pt`.

    Raises ConfigError: another architecture, or an image tokenizer that these files do not hold.
    """
    name, hparams, vae = _image_tokenizer_of(imported)
    if imported.state is None:
        torch.save({"hparams": hparams, "weights": _own(vae)}, path)
        return [path]
    if imported.config.transformer.architecture != PEER:
        raise ConfigError(f"{PEER}: not for {imported.config.transformer.architecture}")
    weights = names.theirs(imported.state, imported.config)
    weights |= {f"{_VAE}{name}": tensor for name, tensor in vae.items()}
    tree = {
        "hparams": _hparams(imported.config),
        "vae_params": hparams,
        "epoch": 0,
        "version": VERSION,
        "vae_class_name": name,
        "weights": _own(weights),
        "opt_state": None,
        "scheduler_state": None,
    }
    torch.save(tree, path)
    return [path]


def _image_tokenizer_of(imported: Imported) -> tuple[str, dict[str, Any] | None, State]:
    """(class, hyper-parameters where the program has them in a file, weights) of its own names."""
    kind, parts = imported.config.image_tokenizer.kind, imported.image_tokenizer
    if kind == PEER:
        return "DiscreteVAE", {key: parts.shape[key] for key in HPARAMS}, parts.state
    if kind == "dvae" and imported.state is not None:
        encoder, decoder = openai_dvae.parts_of(parts.state)
        weights = {f"enc.{name}": tensor for name, tensor in encoder.items()}
        return "OpenAIDiscreteVAE", None, weights | {f"dec.{n}": x for n, x in decoder.items()}
    if kind == "vqgan" and imported.state is not None:
        return "VQGanVAE", None, {f"{_VQGAN}{n}": x for n, x in parts.state.items()}
    raise ConfigError(f"{PEER}: its files do not hold an image tokenizer of the kind {kind}")


def _imported(tree: Any, tokenizer: Path | None) -> Imported:
    if not isinstance(tree, dict) or not isinstance(tree.get("hparams"), Mapping):
        raise CheckpointError("no dalle.pt or vae.pt of DALLE-pytorch (hparams)")
    hparams, weights = dict(tree["hparams"]), tree.get("weights")
    if isinstance(weights, str):
        raise CheckpointError("weights are in DeepSpeed's files: run its zero_to_fp32.py first")
    weights = tensors_of(weights, "weights")
    if "codebook_dim" in hparams or "vae_params" not in tree:
        parts = imported_vae(hparams, weights)
        return Imported(PEER, Config(name=PEER, **_tokenizer_sections(PEER, parts)), parts)
    kind, parts = _image_tokenizer(tree, weights)
    config = _config(hparams, weights, kind, parts)
    content = None
    if tokenizer is not None:
        text_kind, content, classes = text_tokenizer(tokenizer)
        if classes > config.tokenizer.vocab_size:
            raise CheckpointError(
                f"{tokenizer} has {classes} classes, the model {config.tokenizer.vocab_size}"
            )
        section = dataclasses.replace(config.tokenizer, kind=text_kind)
        config = dataclasses.replace(config, tokenizer=section)
    return Imported(PEER, config, parts, names.ours(weights, config), content)


def _image_tokenizer(tree: dict[str, Any], weights: State) -> tuple[str, ImportedTokenizer]:
    """(kind, weights) of the image tokenizer that a dalle.pt holds beside the transformer."""
    own = {n.removeprefix(_VAE): x for n, x in weights.items() if n.startswith(_VAE)}
    if isinstance(tree["vae_params"], Mapping):
        return PEER, imported_vae(dict(tree["vae_params"]), own)
    if any(name.startswith("enc.") for name in own):
        encoder, decoder = (
            {n.removeprefix(part): x for n, x in own.items() if n.startswith(part)}
            for part in ("enc.", "dec.")
        )
        return "dvae", openai_dvae.imported_tokenizer(encoder, decoder, _SIZE)
    if any(name.startswith(_VQGAN) for name in own):
        state = {n.removeprefix(_VQGAN): x for n, x in own.items()}
        grid = _SIZE >> (layers_of(state, "encoder.down.") - 1)
        return "vqgan", vqgan_of(state, "VQGanVAE", grid)
    raise CheckpointError(f"an image tokenizer {tree.get('vae_class_name')} is not read from it")


def _config(hparams: dict[str, Any], weights: State, kind: str, parts: ImportedTokenizer) -> Config:
    options = _options(hparams, weights)
    sections = _tokenizer_sections(kind, parts)
    shape = sections.pop("transformer")
    try:
        transformer = dataclasses.replace(
            shape,
            architecture=PEER,
            layers=hparams["depth"],
            width=hparams["dim"],
            heads=hparams.get("heads", 8),
            text_tokens=hparams.get("text_seq_len", 256),
        )
        vocab = hparams.get("num_text_tokens", 10_000)
    except KeyError as error:
        raise CheckpointError(f"hparams lack {error}") from None
    return Config(
        name=PEER,
        transformer=transformer,
        tokenizer=TokenizerConfig(kind="hugging-face", vocab_size=vocab, bpe_dropout=0.0),
        interop=InteropConfig(options=options),
        train=TrainConfig(text_loss=1 / (1 + options["loss_img_weight"])),
        **sections,
    )


def _options(hparams: dict[str, Any], weights: State) -> dict[str, Any]:
    """`interop.options`; what a file of an older version does not say, its weights do."""
    if hparams.get("sparse_attn"):
        raise CheckpointError("sparse_attn, which only DeepSpeed's kernels compute, is not read")
    told = {
        "rotary_emb": "text_pos_emb.weight" not in weights,
        "shift_tokens": any(n.endswith(".net.0.weight") and names.wrappers(n) > 2 for n in weights),
        "sandwich_norm": any(".norm_out." in name for name in weights),
        "share_input_output_emb": "text_emb.weight" not in weights,
    }
    options: dict[str, Any] = {}
    for key, default in OPTIONS.items():
        value: Any = hparams.get(key)
        if key in ("sandwich_norm", "share_input_output_emb") or (value is None and key in told):
            value = told[key]
        elif value is None:
            value = default
        elif isinstance(default, list):
            value = [value] if isinstance(value, (str, int)) else list(value)
        options[key] = float(value) if isinstance(default, float) else value
    return options


def _tokenizer_sections(kind: str, parts: ImportedTokenizer) -> dict[str, Any]:
    """The config's sections that an image tokenizer decides."""
    sections: dict[str, Any] = {"image_tokenizer": ImageTokenizerConfig(kind=kind)}
    if kind == "dvae":
        config = openai_dvae.config_of(parts)
        return sections | {"dvae": config.dvae, "transformer": config.transformer}
    grid, codes = parts.shape["grid"], parts.shape["codebook_size"]
    return sections | {"transformer": TransformerConfig(image_grid=grid, codebook_size=codes)}


def _hparams(config: Config) -> dict[str, Any]:
    shape, options = config.transformer, dict(config.interop.options)
    for key in ("shared_attn_ids", "shared_ff_ids"):
        options[key] = tuple(options[key]) or None
    return {
        "num_text_tokens": config.tokenizer.vocab_size,
        "text_seq_len": shape.text_tokens,
        "dim": shape.width,
        "depth": shape.layers,
        "heads": shape.heads,
        **options,
        "attn_types": tuple(options["attn_types"]),
    }


def _own(state: State) -> State:
    """Copies, so that a file has of each tensor its own elements and no others."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
