"""An object to a local file: ranged reads side by side, then what arrived is compared."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dalle_dist.errors import DataError
from dalle_dist.storage import retry
from dalle_dist.storage.local import AGAIN, digest_of
from dalle_dist.storage.retry import ObjectChanged, PassingTrouble
from dalle_dist.storage.settings import SETTINGS
from dalle_dist.storage.store import Store

# Some stores' ETag is no MD5 though it looks like one: what comes so many times is the object.
SAME_BODIES = 4


@dataclass(frozen=True)
class Wanted:
    """What is known of an object before it is read; empty where it is not."""

    size: int
    sha256: str = ""  # from the caller's index, which then is the authority
    version: str = ""  # from the store
    md5: str = ""

    @property
    def name(self) -> str:
        """What tells this content from others of the same path."""
        return self.sha256 or f"{self.version} {self.size}"


@dataclass
class Download:
    """Attempts to get one object; `run` is one of them.

    Raises:
        PassingTrouble: the body was wrong.
        DataError: no such object, or one of another size.
    """

    store: Store
    path: str
    _wrong: list[str] = field(default_factory=list)  # MD5 of bodies that were not taken

    def run(self, wanted: Wanted, target: Path) -> None:
        """Fill `target`, which exists."""
        with target.open("r+b") as file:
            file.truncate(wanted.size)
            step = SETTINGS.read_part
            ranges = [(i, min(i + step, wanted.size)) for i in range(0, wanted.size, step)]
            with ThreadPoolExecutor(max(1, min(SETTINGS.threads, len(ranges)))) as pool:
                for _ in pool.map(lambda r: self._part(wanted, file.fileno(), *r), ranges):
                    pass
        self._compare(wanted, target)

    def _part(self, wanted: Wanted, descriptor: int, start: int, end: int) -> None:
        attempt = functools.partial(self._bytes, wanted, start, end)
        os.pwrite(descriptor, retry.call(attempt, beyond=(ObjectChanged,)), start)

    def _bytes(self, wanted: Wanted, start: int, end: int) -> bytes:
        data, total = self.store.read(self.path, start, end, wanted.version)
        if total is not None and total != wanted.size:
            if not wanted.sha256:
                raise ObjectChanged(self.path)
            raise DataError(f"{self.path}: {total} bytes, the index says {wanted.size}; {AGAIN}")
        if len(data) != end - start:
            line = f"{self.path}: {len(data)} of {end - start} bytes arrived"
            raise PassingTrouble("truncated", line)
        return data

    def _compare(self, wanted: Wanted, target: Path) -> None:
        if wanted.sha256:
            if digest_of(target, "sha256") != wanted.sha256:
                line = f"{self.path}: sha256 differs from the index; {AGAIN}"
                raise PassingTrouble("wrong bytes", line)
        elif wanted.md5:
            found = digest_of(target, "md5")
            if found != wanted.md5 and self._wrong.count(found) < SAME_BODIES - 1:
                self._wrong.append(found)
                raise PassingTrouble("wrong bytes", f"{self.path}: MD5 differs from the ETag")
