"""A source of any kind to a goal of any kind, with what there is to say of it."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle_dist import storage
from dalle_dist.checkpoint.convert import weights_of, write_stage_release
from dalle_dist.checkpoint.export.registry import EXPORTS, export_function
from dalle_dist.checkpoint.formats import (
    LazyTensors,
    read_notes,
    save_tensors,
    shapes_in,
    tensor_files,
)
from dalle_dist.checkpoint.names import CONFIG
from dalle_dist.checkpoint.read import TensorSource
from dalle_dist.checkpoint.release import TOKENIZER_FILE
from dalle_dist.conversion.parity import (
    LARGEST_MODEL,
    export_parity,
    fp32_bytes,
    imported_parity,
    in_words,
    release_parity,
)
from dalle_dist.conversion.source import (
    CheckpointSource,
    PeerSource,
    ReleaseSource,
    find_source,
)
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.generate.generator import DTYPES
from dalle_dist.image_tokenizer.dvae import DVAETokenizer
from dalle_dist.image_tokenizer.registry import image_tokenizer_class
from dalle_dist.interop.imported import Imported, ImportedTokenizer
from dalle_dist.interop.importing import parity, write_release
from dalle_dist.interop.registry import PEERS, peer
from dalle_dist.interop.saved_tokenizer import SavedTokenizer
from dalle_dist.stages import STAGES

GOALS = ("release", *EXPORTS, *PEERS)


@dataclass(frozen=True)
class Options:
    """What a conversion may be told beside its paths.

    weights    of a checkpoint: "ema" or "raw"
    dtype      of the weights written; None: as they are, fp32 of a checkpoint
    tokenizer  file of the text tokenizer of another program's model
    hints      what the files of another program do not say, e.g. heads
    stage      ZeRO stage and ...
    world      ... ranks of a DeepSpeed folder; None: those of the checkpoint
    """

    weights: str = "ema"
    dtype: str | None = None
    tokenizer: str | None = None
    hints: Mapping[str, int] = field(default_factory=dict)
    stage: int | None = None
    world: int | None = None


def convert_any(
    paths: Sequence[str], out: str, goal: str = "release", options: Options | None = None
) -> Iterator[str]:
    """Convert, and yield lines: what was found, what was written, and how far they are apart.

    Raises:
        CheckpointError: no such source, `out` is there already, or weights that do not fit.
        ConfigError: a goal that cannot hold the source.
    """
    options = options or Options()
    if goal not in GOALS:
        raise ConfigError(f"--to: '{goal}' is not one of {', '.join(GOALS)}")
    if storage.exists(out) and storage.list_files(out):
        raise CheckpointError(f"{out}: is there already; choose another place")
    source = find_source(paths)
    yield str(source)
    if isinstance(source, CheckpointSource):
        yield from _of_checkpoint(source, out, goal, options)
    elif isinstance(source, ReleaseSource):
        yield from _of_release(source, out, goal, options)
    else:
        yield from _of_peer(source, out, goal, options)


def _of_checkpoint(
    source: CheckpointSource, out: str, goal: str, options: Options
) -> Iterator[str]:
    dtype = DTYPES[options.dtype or "fp32"]
    if goal in EXPORTS:
        chosen = _chosen(goal, options)
        written = export_function(goal)(source.path, source.manifest, out, **chosen)
        yield f"{out}: {len(written)} files: {EXPORTS[goal].help}"
        kind = options.weights if "weights" in EXPORTS[goal].options else "raw"
        state = weights_of(source.path, source.manifest, kind)
        if goal == "deepspeed" and fp32_bytes(state.shapes) > LARGEST_MODEL:
            yield f"not read back: its flat files are more than {LARGEST_MODEL / 1e9:.0f} GB"
            return
        yield in_words(export_parity(goal, out, written, state))
    elif goal == "release":
        state = weights_of(source.path, source.manifest, options.weights, dtype)
        digest = write_stage_release(out, source.manifest, state)
        yield f"{out}: release {digest}"
        exact = weights_of(source.path, source.manifest, options.weights)
        yield in_words(release_parity(source.stage, source.config, exact, out))
    else:
        with tempfile.TemporaryDirectory() as folder:
            release = storage.join(folder, "release")
            state = weights_of(source.path, source.manifest, options.weights)
            write_stage_release(release, source.manifest, state)
            made = ReleaseSource(release, source.stage, source.config)
            yield from _of_release(made, out, goal, options)


def _chosen(goal: str, options: Options) -> dict[str, object]:
    """What was asked for of the options that a format has."""
    given = {
        "weights": options.weights,
        "dtype": DTYPES.get(options.dtype or ""),
        "stage": options.stage,
        "world": options.world,
    }
    known = EXPORTS[goal].options
    return {name: value for name, value in given.items() if name in known and value is not None}


def _of_release(source: ReleaseSource, out: str, goal: str, options: Options) -> Iterator[str]:
    files = tensor_files(storage.join(source.path, STAGES[source.stage].weights))
    state = _read(files, options.dtype)
    if goal in EXPORTS:
        raise ConfigError(
            f"--to {goal}: made of checkpoints; a release has no optimizer state, and its weights "
            f"are {Path(files[0]).name}"
        )
    if goal == "release":
        yield f"{out}: release {_rewrite(source, files, out, state)}"
        exact = _read(files, None)
        yield in_words(release_parity(source.stage, source.config, exact, out))
    else:
        yield from _to_peer(imported_of(source), out, goal)


def _to_peer(imported: Imported, out: str, goal: str) -> Iterator[str]:
    """Write another program's files, and read them again."""
    written = peer(goal).export(imported, Path(out))
    yield f"{', '.join(map(str, written))}: for {goal}"
    again = peer(goal).load([Path(out)], None, **_hints_of(imported, goal))
    yield in_words(imported_parity(imported, again))


def _of_peer(source: PeerSource, out: str, goal: str, options: Options) -> Iterator[str]:
    imported = _import(source, options)
    if goal in EXPORTS:
        raise ConfigError(f"--to {goal}: made of checkpoints of ours; use --to release")
    if goal == "release":
        if options.dtype not in (None, "fp32"):
            raise ConfigError("--dtype: convert to a release first, and that to another dtype")
        yield f"{out}: release {write_release(imported, out)}"
        yield in_words(parity(imported, out))
    else:
        yield from _to_peer(imported, out, goal)


def _hints_of(imported: Imported, goal: str) -> dict[str, int]:
    """What a program's files do not say of a model that was written into them."""
    known: dict[str, Any] = {
        "image_size": imported.image_tokenizer.shape.get("image_size"),
        "heads": imported.config.transformer.heads,
        "version": imported.config.interop.options.get("version"),
    }
    wanted = list(inspect.signature(peer(goal).load).parameters)[2:]
    return {name: known[name] for name in wanted if known.get(name) is not None}


def _import(source: PeerSource, options: Options) -> Imported:
    tokenizer = None if options.tokenizer is None else Path(options.tokenizer)
    load = peer(source.peer).load
    known = list(inspect.signature(load).parameters)[2:]
    for name in options.hints:
        if name not in known:
            hints = ", ".join(known) or "no hints"
            raise ConfigError(f"--hint {name}: of a model of {source.peer} there are {hints}")
    return load(source.paths, tokenizer, **options.hints)


def _read(files: Sequence[str], dtype: str | None) -> LazyTensors:
    """The tensors of safetensors files, one by one."""
    shapes = shapes_in(files)
    if dtype is not None:
        shapes = {name: (DTYPES[dtype], shape) for name, (_, shape) in shapes.items()}
    return LazyTensors(shapes, TensorSource.of_files(files).read)


def _rewrite(source: ReleaseSource, files: Sequence[str], out: str, state: LazyTensors) -> str:
    """The release with its weights in another dtype, config last."""
    weights = STAGES[source.stage].weights
    kept = [
        name
        for name in storage.list_files(source.path)
        if not name.startswith(weights.partition(".")[0]) and name != CONFIG
    ]
    for name in kept:
        data = storage.read_bytes(storage.join(source.path, name))
        storage.write_bytes(storage.join(out, name), data)
    digest = save_tensors(storage.join(out, weights), state, read_notes(files[0]))
    config = storage.read_bytes(storage.join(source.path, CONFIG))
    storage.write_bytes(storage.join(out, CONFIG), config)
    return digest


def imported_of(source: ReleaseSource) -> Imported:
    """A release as its exporters take it. Raises ConfigError: a CLIP, which no program here has."""
    if source.stage == "clip":
        raise ConfigError(f"{source.path}: a CLIP, in Hugging Face's own format already")
    kind = image_tokenizer_class(source.config.image_tokenizer.kind)
    if not issubclass(kind, (SavedTokenizer, DVAETokenizer)):
        raise ConfigError(f"{source.path}: an image tokenizer of a kind without exporters")
    tokenizer = kind.load(source.path)
    parts = ImportedTokenizer(tokenizer.shape, tokenizer.model.state_dict())
    if source.stage == "dvae":
        return Imported("", source.config, parts)
    files = tensor_files(storage.join(source.path, STAGES["transformer"].weights))
    text = storage.read_bytes(storage.join(source.path, TOKENIZER_FILE))
    return Imported("", source.config, parts, dict(_read(files, "fp32")), text)
