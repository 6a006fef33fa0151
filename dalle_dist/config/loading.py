"""Presets, YAML files and overrides to a Config, and back to YAML.

`load("emoji", ["train.steps=100"])` reads a preset or a YAML file and applies overrides. Every
error names the key, the value found and what is allowed.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml

from dalle_dist.config.files import text_of
from dalle_dist.config.options import Option, check_value
from dalle_dist.config.presets import read_tree
from dalle_dist.config.root import Config, hints
from dalle_dist.config.suggest import did_you_mean
from dalle_dist.errors import ConfigError, DataError
from dalle_dist.paths import normal

_TYPE_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


def load(source: str, overrides: list[str] | None = None) -> Config:
    """Preset name, path or URL of a YAML file, then `key.sub=value` overrides, to a checked Config.

    Raises:
        ConfigError: no such preset or file; unknown key; wrong type; a value that is not allowed;
            values that do not fit one another; a path whose scheme nothing here reads.
    """
    tree = read_tree(source)
    for override in overrides or []:
        _override(tree, override)
    return _with_normal_paths(from_dict(tree))


def _with_normal_paths(config: Config) -> Config:
    """`~` means the home of whoever loads the config, here as in a shell."""
    images = config.image_tokenizer
    paths = {
        entry.name: _normal(getattr(config.paths, entry.name), f"paths.{entry.name}")
        for entry in dataclasses.fields(config.paths)
    }
    return dataclasses.replace(
        config,
        paths=dataclasses.replace(config.paths, **paths),
        image_tokenizer=dataclasses.replace(
            images, path=_normal(images.path, "image_tokenizer.path")
        ),
    )


def _normal(path: str, key: str) -> str:
    try:
        return normal(path)
    except DataError as error:
        raise ConfigError(f"{key}: {error}") from None


def from_dict(tree: dict[str, Any]) -> Config:
    """Nested dict to a checked Config. Raises ConfigError."""
    return typing.cast(Config, _build(Config, tree, ""))


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dict of plain YAML types; `from_dict` of it gives an equal Config."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """All keys as YAML; `load` of a file with it gives an equal Config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


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


def section_differences(ours: Any, theirs: Any, sections: Iterable[str]) -> list[str]:
    """`difference` of these sections alone, of two configs as nested dicts."""
    pairs = ((s, ours.get(s, {}), theirs.get(s, {})) for s in sections)
    return [line for section, a, b in pairs for line in difference(a, b, f"{section}.")]


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
    kinds = hints(cls)
    names = [entry.name for entry in dataclasses.fields(cls)]
    for key in tree:
        if key not in names:
            raise ConfigError(f"unknown key '{prefix}{key}'{did_you_mean(str(key), names)}")
    return cls(**{key: _convert(kinds[key], value, prefix + key) for key, value in tree.items()})


def _convert(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, f"{key}.")
    origin = typing.get_origin(kind)
    if origin is Literal:
        check_value(key, kind, value, Option(description=""))
        return value
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{key}: {value!r} is not a list")
        (item,) = typing.get_args(kind)
        return [_convert(item, entry, f"{key}[{i}]") for i, entry in enumerate(value)]
    if origin is dict:
        return _mapping(value, key)
    return _scalar(kind, value, key)


def _mapping(value: Any, key: str) -> dict[str, Any]:
    """A dict as it is, or the content of the JSON file at a path."""
    if isinstance(value, str):
        return _read_json(value, key)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{key}: {value!r} is neither keys with values nor a path of a JSON file")
    return value


def _read_json(path: str, key: str) -> dict[str, Any]:
    try:
        tree = json.loads(text_of(path))
    except OSError as error:
        raise ConfigError(f"{key}: '{path}' in {Path.cwd()}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{key}: {path} is not JSON ({error})") from None
    except DataError as error:
        raise ConfigError(f"{key}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{key}: {path} is not a JSON object")
    return tree


def _scalar(kind: type, value: Any, key: str) -> Any:
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
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}: {value!r} is not {_TYPE_NAMES[kind]}")
