"""What was found amiss in the samples that a run reads, told by whoever read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields


@dataclass
class Notes:
    """Of some samples.

    corrupt      keys of images that cannot be decoded; another of their shard stood in
    quarantined  names of shards that stayed bad, each with what is wrong; others stood in
    captions     that were tokenized
    cut          of them, were longer than the text block
    empty        of them, had no token
    """

    corrupt: set[str] = field(default_factory=set)
    quarantined: dict[str, str] = field(default_factory=dict)
    captions: int = 0
    cut: int = 0
    empty: int = 0

    def __bool__(self) -> bool:
        return any(getattr(self, one.name) for one in fields(self))

    def add(self, *others: Notes) -> None:
        for other in others:
            self.corrupt |= other.corrupt
            self.quarantined |= other.quarantined
            self.captions += other.captions
            self.cut += other.cut
            self.empty += other.empty

    def take(self) -> Notes:
        """These notes; what is left is blank."""
        taken = Notes(**vars(self))
        self.__init__()  # type: ignore[misc]
        return taken

    @classmethod
    def together(cls, notes: Iterable[Notes]) -> Notes:
        found = cls()
        found.add(*notes)
        return found
