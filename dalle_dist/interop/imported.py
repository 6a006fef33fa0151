"""What is read from another program's files, before it becomes a release."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dalle_dist.checkpoint.formats import State
from dalle_dist.config import Config


@dataclass(frozen=True)
class ImportedTokenizer:
    """An image tokenizer's weights by our names, and the shape that its class is made from."""

    shape: dict[str, Any]
    state: State


@dataclass(frozen=True)
class Imported:
    """A model of another program.

    peer             name of the program, as in `interop/registry.py`
    config           of the release to be; `image_tokenizer.kind` says the image tokenizer's class
    image_tokenizer  its weights
    state            the transformer's weights by our names; None: an image tokenizer alone
    tokenizer        content of the text tokenizer's file, of the kind `tokenizer.kind`
    """

    peer: str
    config: Config
    image_tokenizer: ImportedTokenizer
    state: State | None = None
    tokenizer: bytes | None = None
