"""Two programs' names of the same weights."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dalle_dist.checkpoint.formats import State
from dalle_dist.errors import CheckpointError

Pairs = Sequence[tuple[str, str]]


def renamed(state: State, pairs: Pairs, path: str) -> State:
    """The state with new names.

    Args:
        pairs: old and new name, or what stands before `.weight` and `.bias` in both; `#` is the
            number of a layer.
        path: where the state comes from, for messages.

    Raises:
        CheckpointError: a weight that no pair names.
    """
    rules = [(re.compile(_pattern(old)), new) for old, new in pairs]
    out = {}
    for name, tensor in state.items():
        new = next((_new(found, to) for rule, to in rules if (found := rule.fullmatch(name))), None)
        if new is None:
            raise CheckpointError(f"{path}: has a weight that its kind of model has not, '{name}'")
        out[new] = tensor
    return out


def backwards(pairs: Pairs) -> list[tuple[str, str]]:
    """The pairs with old and new exchanged."""
    return [(new, old) for old, new in pairs]


def layers_of(state: State, before: str) -> int:
    """How many layers there are whose weights' names begin with `before`, a number and a dot."""
    numbers = [int(m[1]) for name in state if (m := re.match(rf"{re.escape(before)}(\d+)\.", name))]
    return 1 + max(numbers, default=-1)


def _pattern(old: str) -> str:
    return re.escape(old).replace(r"\#", r"(?P<layer>\d+)") + r"(?P<end>\.weight|\.bias|)"


def _new(found: re.Match[str], to: str) -> str:
    return to.replace("#", found.groupdict().get("layer") or "") + found["end"]
