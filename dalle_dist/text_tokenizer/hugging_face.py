"""Any tokenizer in the JSON format of Hugging Face's `tokenizers`, with the pad as id 0.

Vocabularies that have their pad elsewhere change its id with that of class 0: `with_pad_first`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import tokenizers

from dalle_dist import storage
from dalle_dist.errors import DataError
from dalle_dist.text_tokenizer.protocol import PAD, TextTokenizer


class HuggingFaceTokenizer(TextTokenizer):
    """The ids of the library. The id that is START elsewhere may come out: it is a class here."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        # Pads and cuts are those of the sequence, and a caption's tokens do not depend on them.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: str) -> HuggingFaceTokenizer:
        return cls(read_json(path))

    @property
    def vocab_size(self) -> int:
        return 1 + max(self._tokenizer.get_vocab().values())

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]

    def encode(
        self, text: str, *, dropout: float = 0.0, seed: str | int | None = None
    ) -> list[int]:
        """Raises DataError with dropout, which the library cannot repeat from a seed."""
        if dropout:
            raise DataError("tokenizer.bpe_dropout: must be 0 for tokenizer.kind=hugging-face")
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._tokenizer.decode([i for i in ids if i != PAD])
        return text


def read_json(path: str) -> tokenizers.Tokenizer:
    """Raises DataError: no such file, or not a tokenizer of the library."""
    text = storage.read_bytes(path).decode(errors="replace")
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception:  # the library raises bare Exception on damaged files
        raise DataError(f"{path}: not a tokenizer in the JSON format of tokenizers") from None


def char_bpe(vocab_path: str, merges_path: str, unknown: str, pad: str) -> tokenizers.Tokenizer:
    """The `CharBPETokenizer` of two files, for text in small letters.

    Raises DataError: no such files, or not a vocabulary and merges.
    """
    files = [str(storage.fetch(path)) for path in (vocab_path, merges_path)]
    try:
        tokenizer = tokenizers.CharBPETokenizer.from_file(*files, unk_token=unknown, lowercase=True)
        tokenizer.add_special_tokens([pad])
        return tokenizers.Tokenizer.from_str(tokenizer.to_str())
    except Exception:  # the library raises bare Exception on damaged files
        raise DataError(
            f"{vocab_path}: with {merges_path}, not the vocabulary and merges of a character BPE"
        ) from None


def with_pad_first(tokenizer: tokenizers.Tokenizer, pad: str) -> tuple[bytes, int]:
    """(the JSON file in which the pad and class 0 have changed ids, what the pad's id was)."""
    theirs: int | None = tokenizer.token_to_id(pad)
    if theirs is None:
        raise DataError(f"the tokenizer has no class {pad}")
    tree = json.loads(tokenizer.to_str())
    changed = {theirs: PAD, PAD: theirs}
    vocab = tree["model"]["vocab"]
    tree["model"]["vocab"] = {word: changed.get(i, i) for word, i in vocab.items()}
    for token in tree["added_tokens"]:
        token["id"] = changed.get(token["id"], token["id"])
    tree["added_tokens"].sort(key=lambda token: token["id"])
    return json.dumps(tree, ensure_ascii=False).encode(), theirs
