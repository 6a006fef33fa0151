import unicodedata
from collections import Counter

import pytest
import tokenizers

from dalle_dist.errors import DataError
from dalle_dist.text_tokenizer.bpe import PAD, START, Tokenizer, train_tokenizer

CAPTIONS = ["woman astronaut medium skin tone", "man astronaut dark skin tone", "red heart"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, 320)


def test_any_text_survives(tokenizer):
    for text in ("red heart", "fl\u00e2neur \u732b \U0001f408", "tabs\tand  spaces", "a"):
        expected = unicodedata.normalize("NFC", text).lower()
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_case_and_composition_do_not_matter(tokenizer):
    assert tokenizer.encode("RED Heart") == tokenizer.encode("red heart")
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_specials_never_come_out_of_text(tokenizer):
    ids = tokenizer.encode("<pad> <start> red")
    assert min(ids) > START > PAD


def test_seldom_dropped_merges_equal_the_library(tokenizer):
    """The merge loop done here, with a dropout that never strikes, against `tokenizers`."""
    texts = [*CAPTIONS, "astronauts in space", "medium-dark \u00fcber tone!", "", "  a  "]
    for text in texts:
        assert tokenizer.encode(text, dropout=1e-12, seed=0) == tokenizer.encode(text)


def test_dropout_is_seeded_and_still_spells_the_text(tokenizer):
    text = "woman astronaut medium skin tone"
    drawn = [tuple(tokenizer.encode(text, dropout=0.3, seed=f"1 2 {i}")) for i in range(20)]
    assert drawn[3] == tuple(tokenizer.encode(text, dropout=0.3, seed="1 2 3"))
    assert len(set(drawn)) > 5
    assert {tokenizer.decode(ids) for ids in drawn} == {text}
    assert all(len(ids) >= len(tokenizer.encode(text)) for ids in drawn)


def test_padding_and_cutting(tokenizer):
    ids, cut = tokenizer.encode_padded("red heart", 6)
    assert len(ids) == 6 and ids[-1] == PAD and not cut
    ids, cut = tokenizer.encode_padded("red heart " * 9, 6)
    assert len(ids) == 6 and PAD not in ids and cut


def test_file_round_trip_and_fingerprint(tokenizer, tmp_path):
    path = str(tmp_path / "tokenizer.json")
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("red heart") == tokenizer.encode("red heart")
    plain = tokenizers.Tokenizer.from_file(path)
    assert plain.encode("red heart").ids == tokenizer.encode("red heart")
    assert train_tokenizer(CAPTIONS[:4], 320).fingerprint != tokenizer.fingerprint


def test_a_small_corpus_has_the_classes_asked_for_and_the_same_tokens(tmp_path):
    tokenizer, large = train_tokenizer(["red heart"] * 4, 258), train_tokenizer(["red heart"], 4000)
    assert (tokenizer.vocab_size, large.vocab_size) == (258, 4000)
    path = str(tmp_path / "tokenizer.json")
    large.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.vocab_size == 4000 and loaded.fingerprint == large.fingerprint
    for text in ("red heart", "<unused-3999>", "something else"):
        for dropout in (0.0, 0.1):
            ids = loaded.encode(text, dropout=dropout, seed=0)
            assert loaded.decode(ids) == text and max(ids) < 300


def test_vocabulary_is_bounded(tokenizer):
    assert tokenizer.vocab_size == 320
    with pytest.raises(DataError, match="vocab_size: 100 is below 258"):
        train_tokenizer(CAPTIONS, 100)
    with pytest.raises(DataError, match="no captions"):
        train_tokenizer(["", " "], 320)


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(DataError, match="not a tokenizer"):
        Tokenizer.load(str(path))
    other = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    other.save(str(path))
    with pytest.raises(DataError, match="ids 0 and 1 are not"):
        Tokenizer.load(str(path))


def test_dropped_pairs_are_drawn_anew_after_each_merge():
    """`ab` merges with probability 0.5; in `abab` the second pair has two more chances.

    By hand, of a word with pairs of the same rank (a b) (b a: none) (a b): both merge with
    probability 1/3 of 1/2 ... the chance that none merges is 1/4, and that just one does is the
    chance that the other is then dropped, 3/4 * 1/2.
    """
    tokenizer = train_tokenizer(["ab ab ab"], 259)
    assert tokenizer.encode("xabxabx") != list("xabxabx")
    counts = Counter(
        len(tokenizer.encode("xabxabx", dropout=0.5, seed=seed)) - len(tokenizer.encode("xabxabx"))
        for seed in range(4000)
    )
    shares = [counts[extra] / 4000 for extra in (2, 1, 0)]
    assert shares == pytest.approx([1 / 4, 3 / 8, 3 / 8], abs=0.03)


def test_a_caption_without_spaces_costs_no_more_than_what_is_kept_of_it():
    sentence = "一只猫坐在红色的垫子上旁边有一条狗"
    tokenizer = train_tokenizer([sentence, "red heart"] * 50, 400)
    merged = []
    merge = tokenizer._merges.merge
    tokenizer._merges.merge = lambda word, *rest: merged.append(len(word)) or merge(word, *rest)
    ids, cut = tokenizer.encode_padded(sentence * 500, 256, dropout=0.1, seed=1)
    assert len(ids) == 256 and cut
    assert sum(merged) <= 257 * tokenizer._longest
    whole = tokenizer.encode(sentence, dropout=0.1, seed=1)
    short, cut = tokenizer.encode_padded(sentence, 256, dropout=0.1, seed=1)
    assert short == whole + [PAD] * (256 - len(whole)) and not cut


def test_the_first_ids_of_a_long_caption_are_those_of_its_first_words():
    tokenizer = train_tokenizer(["a red heart", "a blue heart"], 300)
    words = "a red heart " * 300
    ids, cut = tokenizer.encode_padded(words, 20, dropout=0.3, seed=5)
    assert cut and ids == tokenizer.encode(words, dropout=0.3, seed=5)[:20]
