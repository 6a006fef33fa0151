"""`dalle-dist data verify`: whether shards are what their index says."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dalle_dist import storage
from dalle_dist.data.decode import decode_sample
from dalle_dist.data.pool import FEWER, KILLED, shared_out
from dalle_dist.data.shards import ShardSet, parts_of
from dalle_dist.data.token_dataset import NpyReader
from dalle_dist.errors import DataError

NAMED = 5  # shards in the last line; all are named in lines of their own
KEYS = 3  # that are in several shards, and are named


def verify(folder: str, processes: int | None = None, decode: bool = False) -> None:
    """Compare the shards of `folder`, or of its train/ and held-out/, with their index.

    Tars that are remote are fetched anew, past the cache. Each bad shard is a line on stdout.

    Args:
        processes: None: as many as there are cores.
        decode: images are decoded, and codes compared with their number and their classes.

    Raises:
        DataError: no shards here, or not all are as they should be.
    """
    if processes is not None and processes < 1:
        raise DataError(f"--processes {processes}: at least 1")
    faults = list[str]()
    for place in parts_of(folder):
        shards = ShardSet(place)
        count = processes or len(os.sched_getaffinity(0))
        with _past_the_cache(shards, count):
            found = _findings(shards, count, decode)
            wrong = list(_summary(shards, found))
        if not wrong:
            print(f"{place}: {len(shards)} {shards.index.kind} in {len(found)} shards are sound")
        faults += wrong
    if faults:
        raise DataError("; ".join(faults))


@dataclass(frozen=True)
class _Finding:
    """Of a shard: what is wrong with it, or ""; 64-bit hashes of the keys of its samples."""

    shard: int
    wrong: str
    keys: NDArray[np.uint64]


def _findings(shards: ShardSet, processes: int, decode: bool) -> list[_Finding]:
    def call(shard: int) -> _Finding:
        return _look(shards, shard, decode)

    total, found = len(shards.sizes), list[_Finding]()
    killed = f"{shards.folder}: {KILLED}; give the same command, with {FEWER}"
    with tqdm(total=total, desc=f"verify {shards.folder}", unit="shard") as bar:
        for finding in shared_out(call, total, processes, killed):
            if finding.wrong:
                tqdm.write(f"bad: {finding.wrong}", file=sys.stdout)
            found.append(finding)
            bar.update()
    return sorted(found, key=lambda finding: finding.shard)


def _look(shards: ShardSet, shard: int, decode: bool) -> _Finding:
    keys, unreadable, wrong = list[bytes](), list[str](), ""
    readable = _readable(shards) if decode else None
    try:
        for sample in shards.verified(shard):
            keys.append(hashlib.blake2b(sample["__key__"], digest_size=8).digest())
            if readable is not None and not readable(sample):
                unreadable.append(sample["__key__"].decode())
    except DataError as error:
        wrong = str(error)
    if unreadable and not wrong:
        what = f"{len(unreadable)} samples cannot be decoded, e.g. {unreadable[0]}"
        wrong = f"{shards.index.shards[shard].name}: {what}"
    return _Finding(shard, wrong, np.frombuffer(b"".join(keys), np.uint64))


def _readable(shards: ShardSet) -> Callable[[dict[str, bytes]], bool]:
    if shards.index.kind == "images":
        return lambda sample: decode_sample(sample) is not None
    npy, meta = NpyReader(), shards.index.meta
    grid, classes = meta.get("grid"), meta.get("codebook_size")

    def has_codes(sample: dict[str, bytes]) -> bool:
        try:
            codes = np.atleast_2d(npy.read(sample.get("npy", b"")))
        except ValueError:
            return False
        whole = grid is None or codes.shape[-1] == grid**2
        return whole and (classes is None or int(codes.max(initial=0)) < classes)

    return has_codes


def _summary(shards: ShardSet, found: list[_Finding]) -> Iterator[str]:
    names = [shards.index.shards[f.shard].name for f in found if f.wrong]
    if names:
        named = ", ".join(names[:NAMED]) + ", ..." * (len(names) > NAMED)
        yield (
            f"{shards.folder}: {len(names)} of {len(found)} shards are damaged: {named}; fetch or "
            "build them again"
        )
    hashes = np.sort(np.concatenate([finding.keys for finding in found]))
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if len(repeated):
        yield (
            f"{shards.folder}: {len(repeated)} keys come more than once, but must be unique in a "
            f"part: {', '.join(_places(shards, found, repeated[:KEYS]))}; build the set again from "
            "each source once"
        )


def _places(shards: ShardSet, found: list[_Finding], repeated: NDArray[np.uint64]) -> Iterator[str]:
    """The keys, each with the shards that it is in."""
    places = defaultdict[str, list[str]](list)
    for finding in found:
        names = shards.column(finding.shard, "key") if np.isin(repeated, finding.keys).any() else []
        for number in np.flatnonzero(np.isin(finding.keys, repeated)):
            places[names[number]].append(shards.index.shards[finding.shard].name)
    for key, tars in places.items():
        yield f"{key} in {' and '.join(tars[:NAMED])}{' ...' * (len(tars) > NAMED)}"


@contextlib.contextmanager
def _past_the_cache(shards: ShardSet, processes: int) -> Iterator[None]:
    """For remote shards a cache of their own, which holds those that are looked at."""
    if not shards.remote:
        yield
        return
    folder, budget = storage.cache_folder(), storage.cache_budget()
    largest = max(info.bytes + info.side_bytes for info in shards.index.shards)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            apart = stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix="verify-"))
        except OSError as error:
            raise storage.not_written(folder, error) from None
        stack.callback(storage.configure, str(folder), budget)
        storage.configure(apart, min(budget, 4 * processes * largest))
        yield
