"""Captions as CLIP's text encoder takes them."""

from __future__ import annotations

import hashlib

from dalle_dist.text_tokenizer.protocol import PAD, TextTokenizer


def caption_ids(tokenizer: TextTokenizer, caption: str, length: int, end: int) -> list[int]:
    """Exactly `length` ids: the caption, cut where it is too long, `end`, and PAD after it."""
    ids = tokenizer.encode(caption)[: length - 1]
    return [*ids, end, *[PAD] * (length - 1 - len(ids))]


def hashed(ids: list[int]) -> int:
    """A signed 64-bit number by which ranks can tell whether two captions are the same."""
    digest = hashlib.blake2b(repr(ids).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
