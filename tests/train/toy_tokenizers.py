"""Tokenizers that somebody else might bring: whole classes, registered by tests alone."""

import hashlib
import json

import torch

from dalle_dist import storage
from dalle_dist.text_tokenizer.protocol import START, TextTokenizer


class Brightness:
    """Each cell of the grid is coded by its mean brightness, and decoded to that grey."""

    files = ("brightness.json",)

    def __init__(self, text):
        self._text, shape = text, json.loads(text)
        self.image_size, self.grid = shape["image_size"], shape["grid"]
        self.codebook_size = shape["levels"]

    @classmethod
    def load(cls, folder, device="cpu"):
        return cls(storage.read_bytes(storage.join(folder, cls.files[0])).decode())

    @property
    def fingerprint(self):
        return hashlib.sha256(self._text.encode()).hexdigest()[:16]

    def encode(self, images_BCHW):
        cells_BGG = torch.nn.functional.adaptive_avg_pool2d(images_BCHW.mean(1), self.grid)
        return (cells_BGG * (self.codebook_size - 1)).round().long().flatten(1)

    def decode(self, codes_BN):
        grey_B1GG = (codes_BN.float() / (self.codebook_size - 1)).view(-1, 1, self.grid, self.grid)
        scale = self.image_size // self.grid
        return grey_B1GG.repeat(1, 3, 1, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)


class Letters(TextTokenizer):
    """A token for each letter from a to z."""

    def __init__(self, first):
        self._first = first

    @classmethod
    def load(cls, path):
        return cls(int(storage.read_bytes(path)))

    @property
    def vocab_size(self):
        return self._first + 26

    @property
    def fingerprint(self):
        return f"letters{self._first:09d}"

    def encode(self, text, *, dropout=0.0, seed=None):
        return [self._first + ord(c) - ord("a") for c in text.lower() if "a" <= c <= "z"]

    def decode(self, ids):
        return "".join(chr(i - self._first + ord("a")) for i in ids if i > START)
