"""Tokenizers of the `tokenizers` library with the pad as class 0."""

import json

import pytest
import tokenizers

from dalle_dist.errors import DataError
from dalle_dist.text_tokenizer.hugging_face import char_bpe, with_pad_first
from dalle_dist.text_tokenizer.registry import load_text_tokenizer

CAPTIONS = ["a red heart, a red car", "the cat reads in a red chair", "caf\u00e9 au lait!"] * 3


@pytest.fixture
def files(tmp_path):
    """vocab.json and merges.txt of a character BPE, pad last but two."""
    made = tokenizers.CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    made.train_from_iterator(CAPTIONS, vocab_size=80, special_tokens=["[UNK]"], show_progress=False)
    tree = json.loads(made.to_str())["model"]
    vocab = tree["vocab"] | {"[PAD]": len(tree["vocab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tree["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")


def theirs(files):
    """The library's own tokenizer of the files, padded to 30 as minDALL-E's."""
    tokenizer = tokenizers.CharBPETokenizer.from_file(*files, unk_token="[UNK]", lowercase=True)
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.enable_padding(length=30, pad_id=tokenizer.token_to_id("[PAD]"))
    tokenizer.enable_truncation(max_length=30)
    return tokenizer


def ours(files, tmp_path):
    data, pad = with_pad_first(char_bpe(*files, "[UNK]", "[PAD]"), "[PAD]")
    (tmp_path / "tokenizer.json").write_bytes(data)
    return load_text_tokenizer("hugging-face", str(tmp_path / "tokenizer.json")), pad


@pytest.mark.parametrize("text", [*CAPTIONS[:3], "A Red XYZ", "", "caf\u00e9\u6f22 chair" * 9])
def test_ids_are_the_librarys_with_pad_and_class_0_changed(files, tmp_path, text):
    tokenizer, pad = ours(files, tmp_path)
    wanted = theirs(files).encode(text).ids
    ids, cut = tokenizer.encode_padded(text, 30)
    assert [{0: pad, pad: 0}.get(i, i) for i in ids] == wanted
    assert cut == (len(text) > 90)


def test_text_comes_back(files, tmp_path):
    tokenizer, pad = ours(files, tmp_path)
    assert pad == tokenizer.vocab_size - 1 > 20
    assert tokenizer.decode([*tokenizer.encode("A red  chair"), 0, 0]) == "a red chair"


def test_a_tokenizer_that_pads_and_cuts_by_itself_does_not_here(files, tmp_path):
    theirs(files).save(str(tmp_path / "padded.json"))
    tokenizer = load_text_tokenizer("hugging-face", str(tmp_path / "padded.json"))
    assert len(tokenizer.encode("a")) == 1 and len(tokenizer.encode("cat " * 40)) > 30


def test_dropout_is_refused(files, tmp_path):
    with pytest.raises(DataError, match=r"bpe_dropout: must be 0"):
        ours(files, tmp_path)[0].encode("a", dropout=0.1)


def test_others_are_refused_in_one_line(files, tmp_path):
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match=r"broken\.json: not a tokenizer"):
        load_text_tokenizer("hugging-face", str(tmp_path / "broken.json"))
    with pytest.raises(DataError, match=r"broken\.json: with .*merges\.txt, not the vocabulary"):
        char_bpe(str(tmp_path / "broken.json"), files[1], "[UNK]", "[PAD]")
    with pytest.raises(DataError, match="no class <nothing>"):
        with_pad_first(char_bpe(*files, "[UNK]", "[PAD]"), "<nothing>")
