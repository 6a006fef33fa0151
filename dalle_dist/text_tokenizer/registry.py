"""Kinds of text tokenizers by name, the values of the config's `tokenizer.kind`."""

from __future__ import annotations

from dalle_dist.errors import ConfigError
from dalle_dist.stages import find
from dalle_dist.text_tokenizer.protocol import TextTokenizer

# Module and class; imported when first asked for.
KINDS = {"bpe": "dalle_dist.text_tokenizer.bpe.Tokenizer"}


def load_text_tokenizer(kind: str, path: str) -> TextTokenizer:
    """The tokenizer in the file at `path`.

    Raises:
        ConfigError: no such kind.
        DataError: no such file, or not a tokenizer of this kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"tokenizer.kind: '{kind}' is not one of {', '.join(KINDS)}")
    found: type[TextTokenizer] = find(KINDS[kind])
    return found.load(path)
