"""How many captions are cut to the text block, and how many are empty."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_dist.data.shards import ShardSet
from dalle_dist.data.token_dataset import TokenDataset

CAPTIONS, SHARDS = 2_000, 20  # looked at, at most


@dataclass(frozen=True)
class Captions:
    """Of the training set's captions, some that are looked at before the first step.

    total     captions of the training set
    looked_at of them, evenly spaced
    cut       have more tokens than `limit`, those of the text block
    empty     have none
    longest   tokens of the longest, uncut
    """

    total: int
    looked_at: int
    cut: int
    empty: int
    longest: int
    limit: int

    @classmethod
    def of(cls, dataset: TokenDataset) -> Captions:
        """Of evenly spaced samples of evenly spaced shards: side files alone are read."""
        texts = [dataset.source.caption(text, "looked at") for text in _some(dataset.shards)]
        limit = dataset.text_tokens
        lengths = [len(dataset.tokenizer.encode(text)) for text in texts]
        cut = sum(length > limit for length in lengths)
        return cls(len(dataset), len(texts), cut, lengths.count(0), max(lengths), limit)

    @property
    def measures(self) -> dict[str, float]:
        """Shares of those looked at, for the log."""
        return {
            "captions_cut": self.cut / self.looked_at,
            "captions_empty": self.empty / self.looked_at,
        }

    def __str__(self) -> str:
        of = f"{self.looked_at:,}"
        if self.looked_at < self.total:
            of += f" looked at, of {self.total:,}"
        longest = f"the longest has {self.longest} tokens"
        empty = f"{self.empty:,} ({self.empty / self.looked_at:.1%}) are empty; " * bool(self.empty)
        if not self.cut:
            return f"none of {of} is cut; {empty}{longest}"
        limit = f"transformer.text_tokens={self.limit}"
        cut = f"{self.cut:,} of {of} ({self.cut / self.looked_at:.1%}) are cut to {limit}"
        return f"{cut}; {empty}{longest}"


def _some(shards: ShardSet) -> list[str]:
    chosen, found = shards.evenly(SHARDS), list[str]()
    for shard in chosen:
        texts = shards.captions(shard)
        most = min(len(texts), -(-CAPTIONS // len(chosen)))
        found += [texts[j * len(texts) // most] for j in range(most)]
    return found
