"""The merge loop done here against the library's, on random text."""

import random

from dalle_dist.text_tokenizer.bpe import PAD, START, train_tokenizer

CAPTIONS = [
    "a red heart",
    "woman health worker medium-light skin tone",
    "c\u00f4te d\u2019ivoire",
] * 4


def test_merging_without_dropout_is_the_librarys():
    """The smallest positive dropout takes our own path and drops nothing."""
    tokenizer, generator = train_tokenizer(CAPTIONS, 400), random.Random(0)
    for _ in range(500):
        text = "".join(generator.choices("aehlmnorst wd-\u2019\u00c9e\u0301\u6f221<>", k=30))
        assert tokenizer.encode(text, dropout=1e-300, seed=0) == tokenizer.encode(text)


def test_all_merges_dropped_leaves_the_bytes():
    tokenizer = train_tokenizer(CAPTIONS, 400)
    text = CAPTIONS[1]
    assert len(tokenizer.encode(text)) < 20
    # One per letter, and the space that the library puts before the first.
    assert len(tokenizer.encode(text, dropout=1 - 1e-12, seed=0)) == len(text) + 1


def test_captions_cannot_spell_special_tokens_with_dropout_either():
    tokenizer = train_tokenizer(CAPTIONS, 400)
    for dropout in (0.0, 0.1):
        assert not {PAD, START} & set(tokenizer.encode("<pad><start>", dropout=dropout, seed=0))
