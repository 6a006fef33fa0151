"""What the config says of itself: for the terminal, and as docs/config.md.

`python -m dalle_dist.config.docs` prints the page; `make docs` writes it.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from dalle_dist.config.options import Option, allowed
from dalle_dist.config.root import Config, keys_of, section_names
from dalle_dist.config.suggest import did_you_mean
from dalle_dist.errors import ConfigError

_HEAD = """# Every key of the config

Made by `make docs` from the fields in `dalle_dist/config/`; do not edit. `dalle-dist config
--explain KEY` prints one key or section, `dalle-dist config PRESET` the values that a command would
use. Sources are sections of the paper (arXiv 2102.12092); "ours" is a choice of this package. NaN
and infinity are refused everywhere.

A file may start from another: `base: 12b` as its first key names a preset, or a file by its path
relative to this one. Keys of the file replace those of the base one by one, name and paths included
where it gives them; lists and `deepspeed` are replaced as a whole.
"""


class _Key(NamedTuple):
    name: str  # with its section, as on the command line
    kind: Any
    default: Any
    meaning: Option

    def facts(self) -> dict[str, str]:
        """What is known of the key, by the name of the column."""
        return {
            "type": _type_name(self.kind),
            "default": _value(self.default),
            "unit": self.meaning.unit,
            "allowed": allowed(self.kind, self.meaning),
            "source": self.meaning.source,
        }


def explain(key: str) -> str:
    """A key, or all keys of a section, in lines for the terminal.

    Raises ConfigError when there is no such key or section.
    """
    found = [entry for entry in _all_keys() if entry.name == key or _section(entry) == key]
    if not found:
        names = [entry.name for entry in _all_keys()]
        leaves = [name for name in names if name.endswith(f".{key}")]
        hint = f"; did you mean {' or '.join(leaves)}?" if leaves else ""
        hint = hint or did_you_mean(key, [*names, *section_names()])
        raise ConfigError(f"--explain: no key or section '{key}'{hint}")
    head = [f"{key}: {section_names()[key].__doc__}", ""] if key in section_names() else []
    return "\n".join([*head, "\n\n".join(map(_block, found))])


def markdown() -> str:
    """The page docs/config.md."""
    parts = [_HEAD]
    for section in ["", *section_names()]:
        rows = [entry for entry in _all_keys() if _section(entry) == section]
        title = f"`{section}`" if section else "Top level"
        about = section_names()[section].__doc__ if section else "Keys outside of any section."
        parts.append(f"## {title}\n\n{about}\n\n{_table(rows)}\n")
    return "\n".join(parts)


def _all_keys() -> Iterator[_Key]:
    defaults = Config()
    for section, owner in {"": defaults, **_sections(defaults)}.items():
        for name, kind, meaning in keys_of(type(owner)):
            yield _Key(f"{section}.{name}".lstrip("."), kind, getattr(owner, name), meaning)


def _sections(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in section_names()}


def _section(key: _Key) -> str:
    return key.name.rpartition(".")[0]


def _block(key: _Key) -> str:
    lines = [f"  {name:8} {text}" for name, text in key.facts().items() if text]
    return "\n".join([key.name, f"  {key.meaning.description}", *lines])


def _table(keys: list[_Key]) -> str:
    columns = ("key", "meaning", "type", "default", "unit", "allowed", "source")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for key in keys:
        leaf = key.name.rpartition(".")[2]
        cells = {"key": f"`{leaf}`", "meaning": key.meaning.description, **key.facts()}
        lines.append(f"| {' | '.join(cells[c].replace('|', chr(92) + '|') for c in columns)} |")
    return "\n".join(lines)


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "choice"
    names = {bool: "true or false", int: "integer", float: "number", str: "text"}
    if typing.get_origin(kind) is list:
        return f"list of {names[typing.get_args(kind)[0]]}s"
    return names.get(kind, "keys with values, or a path")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:g}"
    return "(empty)" if value == "" else str(value)


if __name__ == "__main__":
    print(markdown(), end="")
