"""YouTokenToMe's model files, `bpe.model`: the text tokenizer of ruDALL-E.

A text file of numbers: how many letters and rules there are; of each letter its code point and id;
of each rule two ids and the id of both together; last the ids of unknown, pad, begin and end, -1
where there is none. Two rules may spell the same word and have two ids, which the JSON files of
`tokenizers` cannot hold.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from dalle_dist import storage
from dalle_dist.errors import DataError
from dalle_dist.text_tokenizer.merges import Merges
from dalle_dist.text_tokenizer.protocol import PAD, TextTokenizer

SPACE = "\u2581"  # stands for the space before each word
_WORDS = re.compile(rf"[^\t-\r {SPACE}]+")  # what C's isspace separates


@dataclass(frozen=True)
class YTTMModel:
    """What a model file says; rules in their order, first those that merge first."""

    letters: dict[str, int]
    rules: list[tuple[int, int, int]]
    unknown: int
    pad: int
    begin: int
    end: int


def read_model(path: str) -> YTTMModel:
    """Raises DataError: no such file, or not one of YouTokenToMe's."""
    try:
        numbers = [int(word) for word in storage.read_bytes(path).split()]
        letters, rules = 2 * numbers[0], 3 * numbers[1]
        if min(letters, rules) < 0 or len(numbers) != 2 + letters + rules + 4:
            raise ValueError
        pairs, triples = numbers[2:][:letters], numbers[2 + letters :][:rules]
        model = YTTMModel(
            {chr(code): index for code, index in zip(pairs[::2], pairs[1::2], strict=True)},
            list(zip(triples[::3], triples[1::3], triples[2::3], strict=True)),
            *numbers[-4:],
        )
    except (ValueError, IndexError, OverflowError):
        raise DataError(f"{path}: not a model file of YouTokenToMe (bpe.model)") from None
    if model.pad != PAD or SPACE not in model.letters or model.unknown < 0:
        raise DataError(f"{path}: without pad {PAD}, an unknown class and a class of the space")
    return model


class YTTMTokenizer(TextTokenizer):
    """The ids of YouTokenToMe. The id that is START elsewhere may come out: it is a class here."""

    ends = False  # whether a text is put between the ids of begin and end

    def __init__(self, model: YTTMModel, path: str = "") -> None:
        self._model = model
        self._merges = Merges({(x, y): (n, z) for n, (x, y, z) in enumerate(model.rules, 1)})
        self._spelled = {index: letter for letter, index in model.letters.items()}
        for left, right, both in model.rules:
            if left not in self._spelled or right not in self._spelled:
                raise DataError(
                    f"{path}: a rule merges {left} and {right}, one of which is unknown"
                )
            self._spelled[both] = self._spelled[left] + self._spelled[right]
        if self.ends and min(model.begin, model.end) < 0:
            raise DataError(f"{path}: without ids of begin and end, which ruDALL-E's has")

    @classmethod
    def load(cls, path: str) -> YTTMTokenizer:
        return cls(read_model(path), path)

    @property
    def vocab_size(self) -> int:
        model = self._model
        return 1 + max(*self._spelled, model.unknown, model.pad, model.begin, model.end)

    @property
    def fingerprint(self) -> str:
        text = repr((self.ends, sorted(self._model.letters.items()), self._model))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def encode(
        self, text: str, *, dropout: float = 0.0, seed: str | int | None = None
    ) -> list[int]:
        generator, ids = random.Random(seed), list[int]()
        for word in _WORDS.findall(self._prepared(text)):
            merged = self._merges.merge(self._letters(SPACE + word), dropout, generator)
            ids += [self._model.unknown if i < 0 else i for i in merged]
        return [self._model.begin, *ids, self._model.end] if self.ends else ids

    def decode(self, ids: Iterable[int]) -> str:
        words = "".join(self._spelled.get(i, "") for i in ids)
        return words.replace(SPACE, " ").removeprefix(" ")

    def _prepared(self, text: str) -> str:
        return text

    def _letters(self, word: str) -> list[int]:
        """Ids of a word's letters; a run of those without one is a single -1."""
        ids = [self._model.letters.get(letter, -1) for letter in word]
        return [i for i, before in zip(ids, [0, *ids], strict=False) if (i, before) != (-1, -1)]


class RuDALLETokenizer(YTTMTokenizer):
    """In small letters, between begin and end."""

    ends = True

    def _prepared(self, text: str) -> str:
        return text.lower()
