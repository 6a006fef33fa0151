"""What a checkpoint can be exported to; read without torch, a writer is imported when called for.

Each is a function `write(checkpoint, manifest, out, ...)` that returns the files it wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from dalle_dist.errors import ConfigError


@dataclass(frozen=True)
class Export:
    """A format.

    write    its function by name, for `pkgutil.resolve_name`
    options  keyword arguments of it that a user may give
    """

    write: str
    help: str
    options: tuple[str, ...] = ()


EXPORTS = {
    "deepspeed": Export(
        "dalle_dist.checkpoint.export.deepspeed:write",
        "what DeepSpeed's save_checkpoint writes, for any ZeRO stage and number of ranks",
        ("stage", "world", "precision"),
    ),
    "deepspeed-universal": Export(
        "dalle_dist.checkpoint.export.universal:write",
        "DeepSpeed's universal checkpoint, for ZeRO 1 to 3 with any number of ranks",
    ),
    "torch": Export(
        "dalle_dist.checkpoint.export.torch:write",
        "one .pt file with a state dict",
        ("weights", "dtype"),
    ),
    "transformers": Export(
        "dalle_dist.checkpoint.export.transformers:write",
        "config.json and model.safetensors, for classes of one's own",
        ("weights", "dtype"),
    ),
}


def export_function(name: str) -> Callable[..., list[str]]:
    """Raises ConfigError: no such format."""
    if name not in EXPORTS:
        raise ConfigError(f"to: '{name}' is not one of {', '.join(EXPORTS)}")
    function: Callable[..., Any] = resolve_name(EXPORTS[name].write)
    return function
