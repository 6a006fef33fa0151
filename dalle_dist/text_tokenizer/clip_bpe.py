"""CLIP's vocabulary file, `bpe_simple_vocab_16e6.txt`, as a tokenizer of the `tokenizers` library.

The file has a line for each merge, after a first line that is none. Classes are the 256 bytes, the
bytes that end a word, the merges, and two that stand for the ends of a text.

Programs that read the file undo HTML's escapes and broken encodings in the text beforehand (the
package ftfy); here the text is taken as it is.
"""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from dalle_dist import storage
from dalle_dist.errors import DataError

MERGES = 49_152 - 256 - 2  # that count; the file has more
ENDS = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
WORD_END = "</w>"


def clip_bpe(path: str) -> tuple[bytes, int]:
    """(JSON file for `HuggingFaceTokenizer`, classes); ids are the file's, and "!" has the pad's.

    Raises DataError: no such file, or not one of merges.
    """
    lines = storage.read_bytes(path).decode(errors="replace").split("\n")[1 : MERGES + 1]
    pairs = [line.split() for line in lines if line.strip()]
    merges = [(pair[0], pair[-1]) for pair in pairs]
    if not merges or any(len(pair) != 2 for pair in pairs):
        raise DataError(f"{path}: not a vocabulary of CLIP (bpe_simple_vocab_16e6.txt)")
    classes = _bytes() + [letter + WORD_END for letter in _bytes()]
    classes += [left + right for left, right in merges] + list(ENDS)
    ids = {word: number for number, word in enumerate(classes)}
    if any(piece not in ids for pair in merges for piece in pair):
        raise DataError(f"{path}: merges what is no class")
    return _tokenizer(ids, merges).to_str().encode(), len(classes)


def _tokenizer(ids: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges, end_of_word_suffix=WORD_END))
    one_space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([one_space, normalizers.Lowercase()])
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), "removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    spaces = decoders.Replace(WORD_END, " ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), spaces, decoders.Strip(" ", 0, 1)])
    tokenizer.add_special_tokens([tokenizers.AddedToken(end, normalized=True) for end in ENDS])
    return tokenizer


def _bytes() -> list[str]:
    """The letters that stand for bytes: first the visible ones of Latin-1, then the rest."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in visible] + [chr(256 + n) for n in range(256 - len(visible))]
