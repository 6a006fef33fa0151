"""What `dalle-dist data build` may be asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from dalle_dist.data.build import captions
from dalle_dist.data.build.filters import Filters
from dalle_dist.data.build.samples import Recipe
from dalle_dist.errors import DataError


@dataclass(frozen=True)
class Options:
    """What `data build` is asked for; each field is the option of its name.

    Attributes:
        captions_from: one of `captions.FROM`, or the path of a table.
        part: of the units, those that this process makes: (i, n), i from 0.
    """

    size: int | None = None
    seed: int = 0
    held_out: float = 0.05
    samples_per_shard: int = 1000
    processes: int | None = None
    captions_from: str = "beside"
    caption: str = "first-line"
    encoding: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    filters: Filters = field(default_factory=Filters)
    part: tuple[int, int] = (0, 1)

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.size, self.caption, self.encoding, self.filters)

    def check(self) -> None:
        """Raises DataError."""
        if not 0 < self.held_out < 1 or (self.size is not None and self.size < 1):
            raise DataError(
                f"--held-out {self.held_out} is not in (0, 1), or --size {self.size} below 1"
            )
        if self.samples_per_shard < 1 or (self.processes or 1) < 1:
            raise DataError("--samples-per-shard and --processes are at least 1")
        captions.check_encoding(self.encoding)
        self.filters.check()
