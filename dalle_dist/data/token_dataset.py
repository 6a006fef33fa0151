"""Captions and image tokens of token shards: the samples of stage 2.

Shape suffixes: B batch, T text positions, N image tokens.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dalle_dist.data.order import SampleOrder
from dalle_dist.data.shards import ShardSet
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


class TokenDataset(Dataset):
    """Samples of a folder of token shards; with an order, by position in the endless stream.

    Captions longer than the text block are cut. `fingerprint` is the image tokenizer's.

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
    ) -> None:
        self.shards, self.order, self.tokenizer = ShardSet(folder, "tokens"), order, tokenizer
        self.text_tokens, self.seed, self.noise = text_tokens, seed, noise or TokenNoise()
        meta = self.shards.index.meta
        for name, wanted in (("image_tokenizer", fingerprint), ("grid", grid)):
            if meta.get(name) != wanted:
                raise DataError(
                    f"{folder}: tokens of {name.replace('_', ' ')} {meta.get(name)}, but the run's "
                    f"is {wanted}; encode the images again"
                )

    def __len__(self) -> int:
        return len(self.shards)

    def key(self, index: int) -> str:
        """Key of the image that sample `index` was made from."""
        return self.shards.read(index)["__key__"].decode()

    def caption_tokens(self, index: int) -> int:
        """Tokens of sample `index`'s caption, uncut and without dropout."""
        caption = self.shards.read(index).get("txt", b"").decode(errors="replace")
        return len(self.tokenizer.encode(caption))

    def __getitem__(self, position: int) -> TokenSample:
        epoch, index = self.order.at(position) if self.order else (0, position)
        files = self.shards.read(index)
        codes_N = np.load(io.BytesIO(files["npy"]), allow_pickle=False).astype(np.int64)
        caption, sample_seed = files.get("txt", b""), f"{self.seed} {epoch} {index}"
        return TokenSample(
            self._text(caption.decode(errors="replace"), sample_seed),
            torch.from_numpy(codes_N),
            torch.from_numpy(self._noisy(codes_N, sample_seed)),
        )

    def _text(self, caption: str, sample_seed: str) -> Tensor:
        # Not the stream of BPE dropout, which starts from the sample's seed itself.
        if random.Random(f"caption {sample_seed}").random() < self.noise.caption_dropout:
            return torch.full((self.text_tokens,), PAD)
        ids, _ = self.tokenizer.encode_padded(
            caption, self.text_tokens, dropout=self.noise.bpe_dropout, seed=sample_seed
        )
        return torch.tensor(ids)

    def _noisy(self, codes_N: np.ndarray, sample_seed: str) -> np.ndarray:
        if not self.noise.image_noise:
            return codes_N
        digest = hashlib.blake2b(f"noise {sample_seed}".encode(), digest_size=8).digest()
        generator = np.random.default_rng(int.from_bytes(digest, "big"))
        share = generator.uniform(0, self.noise.image_noise)
        replaced_N = generator.random(codes_N.shape) < share
        classes = self.shards.index.meta["codebook_size"]
        return np.where(replaced_N, generator.integers(classes, size=codes_N.shape), codes_N)


def collate_tokens(samples: Sequence[TokenSample]) -> TokenSample:
    """A batch: each part stacked."""
    return TokenSample(*map(torch.stack, zip(*samples, strict=True)))
