"""The files that DALLE-pytorch takes its text tokenizers from, as tokenizers of ours."""

from __future__ import annotations

from pathlib import Path

from dalle_dist.text_tokenizer.clip_bpe import clip_bpe
from dalle_dist.text_tokenizer.hugging_face import read_json
from dalle_dist.text_tokenizer.registry import load_text_tokenizer


def text_tokenizer(path: Path) -> tuple[str, bytes, int]:
    """(kind, content of its file, classes) of CLIP's merges (.txt), a .json or a YTTM .model.

    Raises DataError: not such a file.
    """
    if path.suffix == ".txt":
        content, classes = clip_bpe(str(path))
        return "hugging-face", content, classes
    if path.suffix == ".json":
        return "hugging-face", path.read_bytes(), read_json(str(path)).get_vocab_size()
    found = load_text_tokenizer("yttm", str(path))
    return "yttm", path.read_bytes(), found.vocab_size
