"""What a text tokenizer must be able to do, whoever trained it.

A new kind is a file with such a class and one entry in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

# The same for all kinds: one whose vocabulary has them elsewhere renumbers its ids.
PAD, START = 0, 1


class TextTokenizer(Protocol):
    """Ids are below `vocab_size`; PAD never comes out of `encode`.

    Nor does START, but of kinds that come with imported models, which give 1 to a token.
    """

    @classmethod
    def load(cls, path: str) -> TextTokenizer:
        """From a file, local or remote. Raises DataError: no such file, or of another kind."""

    @property
    def vocab_size(self) -> int:
        """Classes, the special ones included."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of everything the ids depend on."""

    def encode(
        self, text: str, *, dropout: float = 0.0, seed: str | int | None = None
    ) -> list[int]:
        """Ids of a text; `dropout` is the probability of leaving out a merge (paper 2.2)."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special ones are left out."""

    def encode_cut(
        self, text: str, length: int, *, dropout: float = 0.0, seed: str | int | None = None
    ) -> tuple[list[int], bool]:
        """(the first `length` ids, or all where there are fewer; whether the text was cut)."""
        ids = self.encode(text, dropout=dropout, seed=seed)
        return ids[:length], len(ids) > length

    def encode_padded(
        self, text: str, length: int, *, dropout: float = 0.0, seed: str | int | None = None
    ) -> tuple[list[int], bool]:
        """(exactly `length` ids, PAD after the text; whether the text was cut)."""
        ids, cut = self.encode_cut(text, length, dropout=dropout, seed=seed)
        return ids + [PAD] * (length - len(ids)), cut
