"""OpenAI's released dVAE (openai/DALL-E): the network of `dalle_dist/dvae/model.py` by other names.

Its files are an encoder and a decoder, each a pickled module (encoder.pkl, decoder.pkl) or a state
dict (.pt or .safetensors): two paths in any order, or a folder that holds them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from dalle_dist.checkpoint.formats import SUFFIX, State, save_tensors
from dalle_dist.config import Config, DVAEConfig, ImageTokenizerConfig, TransformerConfig
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.interop.imported import Imported, ImportedTokenizer
from dalle_dist.interop.pickles import read_state

PEER = "openai-dvae"
DOWNSAMPLINGS = 3  # of the four groups in the program
_PARTS = ("encoder", "decoder")
_NAMES = (
    (r"blocks\.group_(\d)\.block_(\d+)\.id_path\.", r"group_\1_block_\2.skip."),
    (r"blocks\.group_(\d)\.block_(\d+)\.res_path\.conv_(\d)\.", r"group_\1_block_\2.residual.\3."),
    (r"blocks\.output\.conv\.", "output."),
    (r"blocks\.input\.", "input."),
)


def detect(paths: Sequence[Path]) -> bool:
    """Two files of such names, or a folder with them."""
    try:
        return [path.stem for path in _files(paths)] == list(_PARTS)
    except CheckpointError:
        return False


def load(paths: Sequence[Path], tokenizer: Path | None = None, image_size: int = 256) -> Imported:
    """The dVAE alone, of no text tokenizer. Raises CheckpointError: files that are not its own."""
    encoder, decoder = (read_state(path) for path in _files(paths))
    if len(encoder.get("blocks.input.w", torch.empty(0)).shape) != 4:
        raise CheckpointError(f"{paths[0]}: no encoder of OpenAI's dVAE (blocks.input.w)")
    if encoder["blocks.input.w"].shape[-1] == 1:
        encoder, decoder = decoder, encoder
    parts = imported_tokenizer(encoder, decoder, image_size)
    return Imported(PEER, config_of(parts), parts)


def config_of(parts: ImportedTokenizer) -> Config:
    """A config whose image tokenizer is this one, and whose transformer fits it."""
    dvae = DVAEConfig(**parts.shape)
    return Config(
        name=PEER,
        dvae=dvae,
        image_tokenizer=ImageTokenizerConfig(kind="dvae"),
        transformer=TransformerConfig(image_grid=dvae.grid, codebook_size=dvae.codebook_size),
    )


def imported_tokenizer(encoder: State, decoder: State, image_size: int) -> ImportedTokenizer:
    """Both parts' weights by our names, in fp32, and the shape that they have.

    Raises CheckpointError: a name or a number of channels that this network has not.
    """
    try:
        width, codes = encoder["blocks.input.w"].shape[0], encoder["blocks.output.conv.w"].shape[0]
        stem = decoder["blocks.input.w"].shape[0]
    except KeyError as error:
        raise CheckpointError(f"OpenAI's dVAE: lacks the tensor {error}") from None
    blocks = {match[1] for name in encoder if (match := re.search(r"\.block_(\d+)\.", name))}
    config = DVAEConfig(
        image_size=image_size,
        codebook_size=codes,
        width=width,
        decoder_stem=stem,
        downsamplings=DOWNSAMPLINGS,
        blocks_per_group=len(blocks),
    )
    parts = zip(_PARTS, (encoder, decoder), strict=True)
    state = {f"{part}.{_ours(name)}": x.float() for part, own in parts for name, x in own.items()}
    return ImportedTokenizer(dataclasses.asdict(config), state)


def export(imported: Imported, path: Path) -> list[Path]:
    """Two state dicts in the folder `path`, by the program's names. Raises ConfigError."""
    if imported.config.image_tokenizer.kind != "dvae" or imported.config.dvae.downsamplings != 3:
        raise ConfigError(f"{PEER}: only a dVAE with dvae.downsamplings 3 has its four groups")
    files = []
    for part, state in zip(_PARTS, parts_of(imported.image_tokenizer.state), strict=True):
        files.append(path / f"{part}{SUFFIX}")
        save_tensors(files[-1], state)
    return files


def parts_of(state: State) -> tuple[State, State]:
    """Encoder and decoder by the program's names, of ours."""
    encoder, decoder = (
        {
            _theirs(name.removeprefix(f"{part}.")): tensor
            for name, tensor in state.items()
            if name.startswith(f"{part}.")
        }
        for part in _PARTS
    )
    return encoder, decoder


def _files(paths: Sequence[Path]) -> list[Path]:
    """Those of encoder and decoder, in this order where their names say so."""
    if len(paths) == 1 and paths[0].is_dir():
        paths = [p for p in sorted(paths[0].iterdir()) if p.stem in _PARTS]
    if len(paths) != 2:
        raise CheckpointError(f"{PEER}: {len(paths)} files; it is two, an encoder and a decoder")
    return sorted(paths, key=lambda path: path.stem, reverse=True)


def _ours(name: str) -> str:
    for pattern, new in _NAMES:
        found, count = re.subn(rf"^{pattern}(?=[wb]$)", new, name)
        if count:
            # Theirs are counted from 1.
            found = re.sub(r"residual\.(\d)", lambda match: f"residual.{int(match[1]) - 1}", found)
            return found[:-1] + {"w": "weight", "b": "bias"}[found[-1]]
    raise CheckpointError(f"{name}: no tensor of OpenAI's dVAE")


def _theirs(name: str) -> str:
    place, _, leaf = name.rpartition(".")
    if place in ("input", "output"):
        return f"blocks.{place}{'.conv' if place == 'output' else ''}.{leaf[0]}"
    group, block, rest = re.fullmatch(r"group_(\d)_block_(\d+)\.(.+)", place).groups()  # type: ignore[union-attr]
    inner = "id_path" if rest == "skip" else f"res_path.conv_{int(rest[-1]) + 1}"
    return f"blocks.group_{group}.block_{block}.{inner}.{leaf[0]}"
