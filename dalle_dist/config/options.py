"""One key of the config: its default, what it means, where it is from, and what it may be."""

from __future__ import annotations

import copy
import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

from dalle_dist.errors import ConfigError

_METADATA = "option"


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a key means and may be, beside its type and default. Bounds of lists hold for items."""

    description: str
    unit: str = ""
    source: str = "ours"  # a section of the paper, or who else chose the default
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    may_be_empty: bool = False  # texts only

    def bounds(self) -> str:
        """The bounds in words, e.g. "at least 0, below 1"; empty without any."""
        names = ("at_least", "above", "at_most", "below")
        limits = ((name.replace("_", " "), getattr(self, name)) for name in names)
        return ", ".join(f"{name} {limit:,}" for name, limit in limits if limit is not None)

    def holds(self, value: float) -> bool:
        """Whether a number is within all bounds."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def option(default: Any, description: str, **meaning: Any) -> Any:
    """A dataclass field with its meaning as metadata; `meaning` holds further fields of `Option`.

    The default is that of the field; lists and dicts are copied for each instance.
    """
    return _field(default, Option(description=description, **meaning))


def required(description: str, **meaning: Any) -> Any:
    """`option` for a field of a base class, whose subclasses each give a default."""
    metadata = {_METADATA: Option(description=description, **meaning)}
    return dataclasses.field(metadata=metadata)


def inherited(base: type, name: str, default: Any, source: str = "ours") -> Any:
    """A field of `base` with this class's default, and the source of that default."""
    (found,) = (f for f in dataclasses.fields(base) if f.name == name)
    return _field(default, dataclasses.replace(option_of(found), source=source))


def option_of(field: dataclasses.Field[Any]) -> Option:
    """The meaning that `option` gave to a field."""
    return typing.cast(Option, field.metadata[_METADATA])


def allowed(kind: Any, meaning: Option) -> str:
    """What a value may be beyond its type, in words; empty when anything of the type goes."""
    if typing.get_origin(kind) is Literal:
        return ", ".join(str(choice) for choice in typing.get_args(kind))
    if kind is bool:
        return "true, false"
    if kind is str:
        return "any text" if meaning.may_be_empty else "any text, not empty"
    return meaning.bounds()


def check_value(key: str, kind: Any, value: Any, meaning: Option) -> None:
    """Raises ConfigError when `value`, of type `kind`, is not what the key may be."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        # 1 == True == 1.0, and only one of them is meant.
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise ConfigError(f"{key}: {value!r} is not one of {', '.join(map(str, arguments))}")
    elif origin is list:
        for number, item in enumerate(value):
            check_value(f"{key}[{number}]", arguments[0], item, meaning)
    elif origin is dict:
        _check_finite(key, value)
    elif kind in (int, float):
        _check_finite(key, value)
        if not meaning.holds(value):
            raise ConfigError(f"{key}: {value} is not {meaning.bounds()}")
    elif kind is str and not value and not meaning.may_be_empty:
        raise ConfigError(f"{key}: the text is empty")


def _check_finite(key: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_finite(f"{key}.{name}", inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_finite(f"{key}[{number}]", inner)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}: {value} is not a finite number")


def _field(default: Any, meaning: Option) -> Any:
    metadata = {_METADATA: meaning}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
