"""CLIP's vocabulary file as a tokenizer of ours, against DALLE-pytorch's own."""

from pathlib import Path

import pytest

from dalle_dist.interop.dalle_pytorch.text import text_tokenizer
from dalle_dist.text_tokenizer.hugging_face import HuggingFaceTokenizer
from tests.interop.oracles import program, stubbed

TEXTS = [
    "a red heart", "  A photo\tof  2 cats, don't  they're…", "café naïve Übergröße",
    "日本語のテキスト", "emoji 😀 and 1234 numbers!!!", "hello-world_x  ", "MIXED Case's",
]  # fmt: skip


def test_ids_are_those_of_its_own_code(tmp_path):
    folder = Path(program("dalle_pytorch").__file__).parent
    pytest.importorskip("regex", reason="its tokenizer needs regex")
    with stubbed():
        from dalle_pytorch.tokenizer import SimpleTokenizer
    theirs = SimpleTokenizer()
    kind, content, classes = text_tokenizer(folder / "data/bpe_simple_vocab_16e6.txt")
    (tmp_path / "tokenizer.json").write_bytes(content)
    ours = HuggingFaceTokenizer.load(str(tmp_path / "tokenizer.json"))
    assert (kind, classes, ours.vocab_size) == ("hugging-face", 49408, theirs.vocab_size)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)).strip() == theirs.decode(theirs.encode(text)).strip()
