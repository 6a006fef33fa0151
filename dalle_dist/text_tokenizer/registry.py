"""Kinds of text tokenizers by name, the values of the config's `tokenizer.kind`."""

from __future__ import annotations

from pkgutil import resolve_name

from dalle_dist.errors import ConfigError
from dalle_dist.text_tokenizer.protocol import TextTokenizer

# For `pkgutil.resolve_name`: imported when first asked for.
KINDS = {
    "bpe": "dalle_dist.text_tokenizer.bpe:Tokenizer",
    "hugging-face": "dalle_dist.text_tokenizer.hugging_face:HuggingFaceTokenizer",
    "yttm": "dalle_dist.text_tokenizer.yttm:YTTMTokenizer",
    "rudalle": "dalle_dist.text_tokenizer.yttm:RuDALLETokenizer",
}


def load_text_tokenizer(kind: str, path: str) -> TextTokenizer:
    """The tokenizer in the file at `path`.

    Raises:
        ConfigError: no such kind.
        DataError: no such file, or not a tokenizer of this kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"tokenizer.kind: '{kind}' is not one of {', '.join(KINDS)}")
    found: type[TextTokenizer] = resolve_name(KINDS[kind])
    return found.load(path)
