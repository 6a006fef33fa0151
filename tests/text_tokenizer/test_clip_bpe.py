"""CLIP's vocabulary file against its merges applied by hand."""

import itertools
import random
import re

import pytest

from dalle_dist.errors import DataError
from dalle_dist.text_tokenizer.clip_bpe import clip_bpe
from dalle_dist.text_tokenizer.registry import load_text_tokenizer

MERGES = [("e", "d</w>"), ("r", "ed</w>"), ("a", "r"), ("c", "ar</w>"), ("h", "e"), ("ar", "t</w>"),
          ("he", "art</w>"), ("a", "r</w>"), ("\u00c3", "\u00a9"), ("c", "ar")]  # fmt: skip
LETTERS = {i: chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))}
LETTERS |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in LETTERS)}
CLASSES = [
    *LETTERS.values(), *(letter + "</w>" for letter in LETTERS.values()),
    *("".join(pair) for pair in MERGES), "<|startoftext|>", "<|endoftext|>",
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    lines = ["a version", *(" ".join(pair) for pair in MERGES)]
    (tmp_path / "bpe.txt").write_text("\n".join(lines), encoding="utf-8")
    return str(tmp_path / "bpe.txt")


@pytest.fixture
def tokenizer(path, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(clip_bpe(path)[0])
    return load_text_tokenizer("hugging-face", str(tmp_path / "tokenizer.json"))


def by_hand(text):
    ids = []
    for word in re.findall(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\s\w]|_)+", text.lower()):
        pieces = [LETTERS[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        while pairs := [pair for pair in itertools.pairwise(pieces) if pair in MERGES]:
            first = min(pairs, key=MERGES.index)
            at = list(itertools.pairwise(pieces)).index(first)
            pieces[at : at + 2] = ["".join(first)]
        ids += [CLASSES.index(piece) for piece in pieces]
    return ids


def test_ids_are_those_of_the_merges(tokenizer):
    generator = random.Random(0)
    texts = ["A red heart, it's 12 cars!", "caf\u00e9  \u6f22\n", "", "can't CAR"]
    texts += ["".join(generator.choices("achedrt'2 \t!\u00e9C", k=30)) for _ in range(300)]
    for text in texts:
        assert tokenizer.encode(text) == by_hand(text), text


def test_the_first_class_is_the_pad(tokenizer):
    assert tokenizer.encode("<|startoftext|>red<|endoftext|>") == [522, 513, 523]
    assert CLASSES.index("!") == 0 and tokenizer.vocab_size == len(CLASSES) == 524


def test_text_comes_back(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("A red  caf\u00e9"), 0, 0]) == "a red caf\u00e9"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version\na b c\n", "not a vocabulary of CLIP"),
        ("", "not a vocabulary of CLIP"),
        ("version\nab c\n", "merges what is no class"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "bpe.txt").write_text(text)
    with pytest.raises(DataError, match=rf"bpe\.txt: {message}") as error:
        clip_bpe(str(tmp_path / "bpe.txt"))
    assert "\n" not in str(error.value)
