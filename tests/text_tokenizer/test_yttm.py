"""YouTokenToMe's model files, read here."""

import random

import pytest

from dalle_dist.errors import DataError
from dalle_dist.text_tokenizer.protocol import PAD
from dalle_dist.text_tokenizer.registry import load_text_tokenizer

# Pad 0, unknown 1, begin 2, end 3; then letters; "abc" is spelled by two rules, 11 and 12.
LETTERS = {"\u2581": 4, "a": 5, "b": 6, "c": 7, "d": 8}
RULES = [(6, 7, 9), (5, 6, 10), (5, 9, 11), (10, 7, 12), (4, 11, 13), (8, 8, 14)]


def written(tmp_path, letters=LETTERS, rules=RULES, special=(1, 0, 2, 3)):
    lines = [
        (len(letters), len(rules)),
        *((ord(c), i) for c, i in letters.items()),
        *rules,
        special,
    ]
    path = tmp_path / "bpe.model"
    path.write_text("".join(" ".join(map(str, line)) + "\n" for line in lines))
    return str(path)


def by_scanning(text, rules=RULES):
    """Each word's ids by the definition: again and again, the first rule, at its leftmost pair."""
    ids = []
    for word in text.replace("\u2581", " ").split():
        pieces = [4] + [LETTERS.get(letter, 1) for letter in word]
        pieces = [i for n, i in enumerate(pieces) if i != 1 or pieces[n - 1] != 1]
        while True:
            found = [
                (rank, n, both)
                for rank, (left, right, both) in enumerate(rules)
                for n in range(len(pieces) - 1)
                if (pieces[n], pieces[n + 1]) == (left, right)
            ]
            if not found:
                break
            _, n, both = min(found)
            pieces[n : n + 2] = [both]
        ids += pieces
    return ids


def test_ids_are_those_of_the_rules_in_their_order(tmp_path):
    tokenizer, generator = load_text_tokenizer("yttm", written(tmp_path)), random.Random(0)
    for _ in range(300):
        text = "".join(generator.choices("abcdxy \t\u2581", k=20))
        assert tokenizer.encode(text) == by_scanning(text), text


def test_two_rules_that_spell_the_same_word_keep_their_ids(tmp_path):
    rules = [(5, 6, 10), (6, 7, 9), (5, 9, 11), (10, 7, 12)]
    assert load_text_tokenizer("yttm", written(tmp_path)).encode("dabc") == [4, 8, 11]
    tokenizer = load_text_tokenizer("yttm", written(tmp_path, rules=rules))
    assert tokenizer.encode("dabc") == [4, 8, 12]
    assert tokenizer.decode([4, 8, 12]) == tokenizer.decode([4, 8, 11]) == "dabc"


def test_unknown_letters_are_one_id_for_each_run(tmp_path):
    assert load_text_tokenizer("yttm", written(tmp_path)).encode("xyzaxx x") == [4, 1, 5, 1, 4, 1]


def test_rudalle_puts_small_letters_between_begin_and_end(tmp_path):
    tokenizer = load_text_tokenizer("rudalle", written(tmp_path))
    assert tokenizer.encode_padded("  ABC d ", 8) == ([2, 13, 4, 8, 3, PAD, PAD, PAD], False)
    assert tokenizer.encode_padded("abc d", 3) == ([2, 13, 4], True)
    assert tokenizer.decode([2, 13, 4, 8, 3, 0, 0]) == "abc d"
    assert tokenizer.vocab_size == 15


def test_dropout_is_seeded_and_leaves_letters(tmp_path):
    tokenizer = load_text_tokenizer("yttm", written(tmp_path))
    drawn = [tokenizer.encode("abc abc", dropout=0.5, seed=seed) for seed in range(20)]
    assert drawn[3] == tokenizer.encode("abc abc", dropout=0.5, seed=3)
    assert len(set(map(tuple, drawn))) > 5
    assert tokenizer.encode("abc", dropout=1 - 1e-12, seed=0) == [4, 5, 6, 7]


def test_the_fingerprint_depends_on_rules_and_kind(tmp_path):
    found = {
        load_text_tokenizer(kind, written(tmp_path)).fingerprint for kind in ("yttm", "rudalle")
    }
    found.add(load_text_tokenizer("yttm", written(tmp_path, rules=RULES[:-1])).fingerprint)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"special": (1, 5, 2, 3)}, "without pad 0"),
        ({"special": (-1, 0, 2, 3)}, "without pad 0"),
        ({"letters": {"a": 5}}, "class of the space"),
        ({"rules": [(5, 99, 9)]}, "a rule merges 5 and 99"),
        ({"special": (1, 0, 2)}, "not a model file"),
        ({"special": ("x", 0, 2, 3)}, "not a model file"),
        ({"special": (1, 0, -1, -1)}, "without ids of begin and end"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, change, message):
    path = written(tmp_path, **change)
    with pytest.raises(DataError, match=message) as error:
        load_text_tokenizer("rudalle", path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
