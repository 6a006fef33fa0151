"""Text to tokens: byte-level BPE on lower-cased NFC text, by Hugging Face `tokenizers`.

Merging with dropout is done here, because the library's own dropout cannot be seeded and a
sample's tokens must depend on (seed, epoch, sample) alone.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from dalle_dist import storage
from dalle_dist.errors import DataError
from dalle_dist.text_tokenizer.merges import Merges
from dalle_dist.text_tokenizer.protocol import PAD, START, TextTokenizer

SPECIAL = ["<pad>", "<start>"]
END = "<end>"  # only in files for `transformers`, after all other classes
CACHED_CAPTIONS = 100_000


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` classes; where the captions have too few pairs, some are never used.

    The captions are read as a stream: only their different words are kept. Raises DataError when
    there is no caption, or vocab_size is below 258 (256 bytes, 2 special).
    """
    least = 256 + len(SPECIAL)
    if vocab_size < least:
        raise DataError(f"tokenizer.vocab_size: {vocab_size} is below {least}, the bytes' own")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_told(captions), trainer)
    return Tokenizer(_filled(tokenizer, vocab_size))


def _told(captions: Iterable[str]) -> Iterator[str]:
    """All captions; a DataError at their end if they say nothing."""
    told = False
    for caption in captions:
        told = told or bool(caption.strip())
        yield caption
    if not told:
        raise DataError("no captions to train a tokenizer on")


def _filled(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> tokenizers.Tokenizer:
    """The same tokenizer with exactly `vocab_size` classes: no merge leads to the added ones.

    A model has as many classes as its config says, however small the corpus.
    """
    tree = json.loads(tokenizer.to_str())
    vocab = tree["model"]["vocab"]
    for i in range(len(vocab), vocab_size):
        vocab[f"<unused-{i}>"] = i
    return tokenizers.Tokenizer.from_str(json.dumps(tree))


def with_end(path: str, vocab_size: int) -> str:
    """The tokenizer in the file at `path` as JSON for `transformers`: its texts end with END.

    END has the id `vocab_size`, however few classes the file has. Raises DataError: no such file,
    not a tokenizer of ours, or of more classes.
    """
    ours = Tokenizer.load(path)
    if ours.vocab_size > vocab_size:
        raise DataError(f"{path}: has {ours.vocab_size} classes, more than {vocab_size}")
    tokenizer = _filled(ours._tokenizer, vocab_size)
    tokenizer.add_special_tokens([END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocab_size)]
    )
    return tokenizer.to_str(pretty=True)


class Tokenizer(TextTokenizer):
    """Ids 0 (`<pad>`) and 1 (`<start>`) never come out of `encode`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        # A caption that spells "<pad>" is text like any other.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        tree = json.loads(tokenizer.to_str())["model"]
        self._ids: dict[str, int] = tree["vocab"]
        merges = (m.split(" ") if isinstance(m, str) else m for m in tree["merges"])
        self._merges = Merges(
            {
                (self._ids[left], self._ids[right]): (rank, self._ids[left + right])
                for rank, (left, right) in enumerate(merges, 1)
            }
        )
        self._longest = max(map(len, self._ids))  # characters of a class, at most
        self._words: dict[str, tuple[str, ...]] = {}

    @classmethod
    def load(cls, path: str) -> Tokenizer:
        """Raises DataError: no such file, or not a tokenizer of ours."""
        text = storage.read_bytes(path).decode(errors="replace")
        try:
            tokenizer = cls(tokenizers.Tokenizer.from_str(text))
        except Exception:  # the library raises bare Exception on damaged files
            raise DataError(f"{path}: not a tokenizer; train one") from None
        if [tokenizer._tokenizer.token_to_id(word) for word in SPECIAL] != [PAD, START]:
            raise DataError(f"{path}: ids 0 and 1 are not {SPECIAL}; train a tokenizer here")
        return tokenizer

    def save(self, path: str) -> None:
        storage.write_bytes(path, self._tokenizer.to_str(pretty=True).encode())

    @property
    def vocab_size(self) -> int:
        """Classes, those included that no text leads to."""
        return self._tokenizer.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        """16 hex digits of everything the tokens depend on."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]

    def encode(
        self, text: str, *, dropout: float = 0.0, seed: str | int | None = None
    ) -> list[int]:
        """Token ids; with dropout, each merge is passed over with that probability (2.2)."""
        if not dropout:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            return ids
        return self._encode_with_dropout(text, sys.maxsize, dropout, seed)

    def encode_cut(
        self, text: str, length: int, *, dropout: float = 0.0, seed: str | int | None = None
    ) -> tuple[list[int], bool]:
        """As in the protocol; with dropout, no more of a long text is merged than is kept."""
        if not dropout:
            return super().encode_cut(text, length)
        ids = self._encode_with_dropout(text, length, dropout, seed)
        return ids[:length], len(ids) > length

    def _encode_with_dropout(
        self, text: str, most: int, dropout: float, seed: str | int | None
    ) -> list[int]:
        """All ids, or the first `most` and some more."""
        generator, ids = random.Random(seed), list[int]()
        for word in self._split(text):
            # The ids that are still wanted, and one more, spell no more of it than this.
            needed = (most - len(ids) + 1) * self._longest
            letters = [self._ids[letter] for letter in word[:needed]]
            ids += self._merges.merge(letters, dropout, generator)
            if len(ids) > most:
                break
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; specials are left out, as is the space before the first word."""
        text: str = self._tokenizer.decode([i for i in ids if i > START])
        return text.removeprefix(" ")

    def _split(self, text: str) -> tuple[str, ...]:
        words = self._words.get(text)
        if words is None:
            normal = self._tokenizer.normalizer.normalize_str(text)
            split = self._tokenizer.pre_tokenizer.pre_tokenize_str(normal)
            words = tuple(word for word, _ in split)
            if len(self._words) < CACHED_CAPTIONS:
                self._words[text] = words
        return words
