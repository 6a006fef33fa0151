"""YAML files to trees of keys: presets and users' files, each on top of its base.

`base: 12b` in a file names the preset or the path, relative to that file, that it starts from; keys
of the file replace those of the base one by one. Any of the files may lie in a store.
"""

from __future__ import annotations

import posixpath
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dalle_dist.config.files import text_of
from dalle_dist.config.root import section_names
from dalle_dist.config.suggest import did_you_mean
from dalle_dist.errors import ConfigError, DataError
from dalle_dist.paths import is_remote, join, normal

BASE = "base"


class _Source(NamedTuple):
    name: str  # for errors, and the same for the same file
    folder: str  # what paths of its base are relative to
    text: str


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("dalle_dist.presets")
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def preset_text(name: str) -> str:
    """A preset's file, comments included."""
    return (resources.files("dalle_dist.presets") / f"{name}.yaml").read_text()


def read_tree(source: str) -> dict[str, Any]:
    """All keys of a preset or a YAML file, those of its base included.

    Raises:
        ConfigError: no such preset or file, here or as a base; not YAML; bases in a circle.
    """
    trees: list[dict[str, Any]] = []
    seen: list[str] = []
    found: _Source | None = _find(source, "", "")
    while found is not None:
        seen.append(found.name)
        if found.name in seen[:-1]:
            raise ConfigError(f"{seen[0]}: base goes in a circle: {' -> '.join(seen)}")
        tree = _parse(found)
        base = tree.pop(BASE, None)
        trees.append(tree)
        found = None if base is None else _find_base(base, found)
    merged: dict[str, Any] = {}
    for tree in reversed(trees):
        merged = _on_top(merged, tree)
    return merged


def _find(source: str, folder: str, prefix: str) -> _Source:
    if source in preset_names():
        return _Source(source, "", preset_text(source))
    try:
        path = _path(source, folder)
        if is_remote(path) or Path(path).is_file():
            return _Source(path, posixpath.dirname(path), text_of(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{prefix}{path}: not text in UTF-8") from None
    except DataError as error:
        raise ConfigError(f"{prefix}{error}") from None
    raise ConfigError(
        f"{prefix}no preset or file '{source}'; presets: {', '.join(preset_names())}"
        f"{did_you_mean(source, preset_names())}"
    )


def _path(source: str, folder: str) -> str:
    source = normal(source)
    if is_remote(source):
        return source
    return join(folder, source) if is_remote(folder) else str(Path(folder) / source)


def _find_base(base: Any, owner: _Source) -> _Source:
    if not isinstance(base, str):
        raise ConfigError(f"{owner.name}: base: {base!r} is not a preset's name or a file's path")
    return _find(base, owner.folder, f"{owner.name}: base: ")


def _parse(source: _Source) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(source.text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source.name}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source.name}: not a mapping of keys to values")
    return tree


def _on_top(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Sections key by key; a value, lists and train.deepspeed included, is replaced as a whole."""
    merged = dict(base)
    for key, value in tree.items():
        below = base.get(key)
        both = isinstance(value, dict) and isinstance(below, dict)
        merged[key] = below | value if both and key in section_names() else value
    return merged
