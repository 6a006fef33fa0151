"""Captions and image tokens of token shards: the samples of stage 2.

Shape suffixes: B batch, T text positions, N image tokens.
"""

from __future__ import annotations

import hashlib
import io
import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dalle_dist.data.loader import Samples
from dalle_dist.data.order import SampleOrder
from dalle_dist.data.source import SampleSource, SourceDataset
from dalle_dist.errors import DataError
from dalle_dist.text_tokenizer.protocol import PAD, TextTokenizer


@dataclass(frozen=True)
class TokenNoise:
    """What is random in a training sample, by (seed, epoch, sample) alone; by default nothing.

    bpe_dropout      probability of leaving out a merge of the text tokenizer
    caption_dropout  probability of the empty caption, all pads, instead of the sample's own
    image_noise      largest share of the image tokens that the model sees replaced by random ones;
                     the share of each sample is uniform between 0 and this
    """

    bpe_dropout: float = 0.0
    caption_dropout: float = 0.0
    image_noise: float = 0.0


class TokenSample(NamedTuple):
    """int64; in a batch, rows of them.

    text   ids of the caption, PAD after it: [T]
    codes  the image tokens, which are to be predicted: [N]
    seen   what the model sees of them before it predicts the next: [N]
    """

    text: Tensor
    codes: Tensor
    seen: Tensor


class TokenDataset(SourceDataset):
    """Samples of a folder of token shards; with an order, by position in the endless stream.

    Captions longer than the text block are cut. Of several crops of an image, (seed, epoch, sample)
    choose one. `fingerprint` is the image tokenizer's.

    Raises:
        DataError: the shards were made by another image tokenizer, or have another grid.
    """

    def __init__(
        self,
        folder: str,
        order: SampleOrder | None,
        tokenizer: TextTokenizer,
        text_tokens: int,
        fingerprint: str,
        grid: int,
        *,
        seed: int = 0,
        noise: TokenNoise | None = None,
        bad_shards: int = 0,
    ) -> None:
        self.source, self.tokenizer = SampleSource(folder, "tokens", order, bad_shards), tokenizer
        self.text_tokens, self.seed, self.noise = text_tokens, seed, noise or TokenNoise()
        self._npy = NpyReader()
        meta = self.shards.index.meta
        for name, wanted in (("image_tokenizer", fingerprint), ("grid", grid)):
            if meta.get(name) != wanted:
                raise DataError(
                    f"{folder}: tokens of {name.replace('_', ' ')} {meta.get(name)}, but the run's "
                    f"is {wanted}; encode the images again"
                )

    def key(self, index: int) -> str:
        """Key of the image that sample `index` was made from."""
        return self.shards.key(index)

    def __getitem__(self, position: int) -> TokenSample:
        place = self.source.reading(position)
        files = self.source.read(place)
        seed = f"{self.seed} {place.epoch} {self.source.index(place)}"
        codes_N = self._codes(files["npy"], seed)
        caption = self.source.caption(files.get("txt", b"").decode(errors="replace"), seed)
        return TokenSample(
            self._text(caption, seed),
            torch.from_numpy(codes_N),
            torch.from_numpy(self._noisy(codes_N, seed)),
        )

    def _codes(self, data: bytes, sample_seed: str) -> np.ndarray:
        codes = self._npy.read(data).astype(np.int64)
        if codes.ndim == 1:
            return codes
        return codes[random.Random(f"crop {sample_seed}").randrange(len(codes))]

    def _text(self, caption: str, sample_seed: str) -> Tensor:
        row_T = np.full(self.text_tokens, PAD, np.int64)
        drop = self.noise.caption_dropout
        # Not the stream of BPE dropout, which starts from the sample's seed itself.
        if drop and random.Random(f"caption {sample_seed}").random() < drop:
            return torch.from_numpy(row_T)
        ids, cut = self.tokenizer.encode_cut(
            caption, self.text_tokens, dropout=self.noise.bpe_dropout, seed=sample_seed
        )
        self.notes.captions += 1
        self.notes.cut += cut
        self.notes.empty += not ids
        row_T[: len(ids)] = ids
        return torch.from_numpy(row_T)

    def _noisy(self, codes_N: np.ndarray, sample_seed: str) -> np.ndarray:
        if not self.noise.image_noise:
            return codes_N
        digest = hashlib.blake2b(f"noise {sample_seed}".encode(), digest_size=8).digest()
        generator = np.random.default_rng(int.from_bytes(digest, "big"))
        share = generator.uniform(0, self.noise.image_noise)
        replaced_N = generator.random(codes_N.shape) < share
        classes = self.shards.index.meta["codebook_size"]
        return np.where(replaced_N, generator.integers(classes, size=codes_N.shape), codes_N)


class NpyReader:
    """Reads .npy files that mostly have the same header, which is parsed once."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[np.dtype, tuple[int, ...]]] = {}

    def read(self, data: bytes) -> np.ndarray:
        """Raises ValueError: not a .npy file, or one of objects or with its columns first."""
        length = 10 + int.from_bytes(data[8:10], "little")
        header = data[:length]
        known = self._known.get(header)
        if known is None:
            file = io.BytesIO(data)
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("not a .npy file of version 1")
            shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
            if columns_first or dtype.hasobject:
                raise ValueError("a .npy file of objects, or with its columns first")
            known = self._known[header] = (dtype, shape)
        dtype, shape = known
        return np.frombuffer(data, dtype, offset=length).reshape(shape)


def collate_tokens(samples: Samples[TokenSample]) -> TokenSample:
    """A batch: each part stacked."""
    return TokenSample(*map(torch.stack, zip(*samples, strict=True)))
