"""How many captions are cut to the text block, and how many are empty."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_dist import storage
from dalle_dist.data.token_dataset import TokenDataset

CAPTIONS = 2_000  # looked at, at most


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
        remote = storage.is_remote(dataset.shards.folder)
        # A shard on S3 is fetched whole for one caption of it.
        range_ = dataset.shards.sizes[0] if remote else len(dataset)
        count, limit = min(range_, CAPTIONS), dataset.text_tokens
        lengths = [dataset.caption_tokens(i * range_ // count) for i in range(count)]
        cut = sum(length > limit for length in lengths)
        return cls(len(dataset), count, cut, lengths.count(0), max(lengths), limit)

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
