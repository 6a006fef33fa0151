"""The nearest training image of each evaluated one, by features: on any number of ranks.

Ranks take the chunks of the training set in turn. What a finished chunk found is kept until all are
merged, so that a call that was cut off goes on where it was. Memory holds the features of the
evaluated images and one block of training images. Neither ranks nor chunks change what is found.

Shape suffixes: Q evaluated images that can be decoded, D features.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dalle_dist import storage
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import UserError
from dalle_dist.evaluation.features import ImageEncoder
from dalle_dist.evaluation.overlap import nearest_cosine
from dalle_dist.overlap.found import ChunkStore, Found, Nearest, read_found, write_found
from dalle_dist.overlap.images import BLOCK, ImageSet, parts
from dalle_dist.overlap.outputs import Labels, Pair, pairs_of, write_keep, write_table
from dalle_dist.overlap.page import REPORT, report

# Of a similarity: sums on another number of threads differ in the seventh digit, and copies of one
# image should be equally near on any.
DECIMALS = 5
CHUNKS, MOST = 256, 65_536  # chunks of a set, and images of a chunk where that would be more


@dataclass(frozen=True)
class Job:
    """What is looked up where, and how it is carried out.

    clip        fingerprint of what computes the features
    out         folder, local or remote
    threshold   similarity from which on an image overlaps; None: not chosen yet
    chunk       training images between which a call that is cut off can go on, a multiple of BLOCK;
                None: hangs on the size of the training set. It changes no result.
    """

    evaluated: ImageSet
    training: ImageSet
    clip: str
    out: str
    threshold: float | None = None
    chunk: int | None = None

    @property
    def digest(self) -> str:
        """Of all that the nearest images depend on."""
        depends = f"{self.evaluated.digest} {self.training.digest} {self.clip} {BLOCK} {DECIMALS}"
        return hashlib.blake2b(depends.encode(), digest_size=16).hexdigest()

    @property
    def chunks(self) -> dict[str, range]:
        """Training images by the digest of their chunk."""
        count = len(self.training)
        size = self.chunk or min(-(-count // (CHUNKS * BLOCK)) * BLOCK, MOST)
        return {f"{self.digest}-{c.start}-{c.stop}": c for c in parts(range(count), size)}


def check_numbers(threshold: float | None, chunk: int | None) -> None:
    """Raise UserError: not what a `Job` takes."""
    if threshold is not None and not -1 <= threshold <= 1:
        raise UserError(f"--threshold: {threshold} is no cosine; from -1 to 1")
    if chunk is not None and (chunk < 1 or chunk % BLOCK):
        raise UserError(f"--chunk: {chunk} is not a multiple of {BLOCK}, which are read at once")


def run(job: Job, encoder: ImageEncoder, ranks: Ranks) -> Found:
    """Look up, unless an earlier call has, and write all files of OUT.

    Raises:
        DataError: one of the sets has no image that can be decoded.
        UserError: OUT is of other sets.
    """
    found = ranks.on_main(lambda: read_found(job.out, job.digest))
    if found is None:
        found = _look_up(job, encoder, ranks)
    pairs = pairs_of(found)
    evaluated = _labels(job.evaluated, {pair.evaluated for pair in pairs}, ranks)
    training = _labels(job.training, {pair.nearest for pair in pairs}, ranks)
    ranks.on_main(lambda: _write(job, found, pairs, evaluated, training))
    return found


def _labels(images: ImageSet, numbers: set[int], ranks: Ranks) -> Labels:
    """Of the images with these numbers, on every rank; each rank reads a run of them.

    They may lie in as many shards: by one rank alone the others would wait for hours.
    """
    runs = parts(sorted(numbers), -(-len(numbers) // ranks.world))
    mine = runs[ranks.rank] if ranks.rank < len(runs) else []
    shared = ranks.gather(ranks.together(lambda: {i: images.label(i) for i in mine}))
    return {number: label for part in shared for number, label in part.items()}


def _write(
    job: Job, found: Found, pairs: Sequence[Pair], evaluated: Labels, training: Labels
) -> None:
    write_table(job.out, pairs, evaluated, training)
    if job.threshold is not None:
        write_keep(job.out, pairs, job.threshold, evaluated)
    text = report(pairs, job.evaluated, job.training, facts(job, found), job.threshold)
    storage.write_bytes(storage.join(job.out, REPORT), text.encode())


def facts(job: Job, found: Found) -> list[tuple[str, str]]:
    """What was compared with what: names and values."""
    evaluated, training, corrupt = job.evaluated, job.training, found.nearest.corrupt
    unread = len(evaluated) - len(found.evaluated_Q)
    return [
        ("evaluation set", f"{evaluated.folder}: {_count(len(evaluated), unread)}"),
        ("training set", f"{training.folder}: {_count(len(training), corrupt)}"),
        ("similarity", f"cosine of the image features of the CLIP {job.clip}"),
    ]


def _count(images: int, corrupt: int) -> str:
    skipped = f", of which {corrupt:,} cannot be decoded, left out" if corrupt else ""
    return f"{images:,} {'image' if images == 1 else 'images'}{skipped}"


def _look_up(job: Job, encoder: ImageEncoder, ranks: Ranks) -> Found:
    evaluated_Q, queries_QD = _queries(job.evaluated, encoder, ranks)
    store = ChunkStore(job.out)
    ranks.together(lambda: _chunks(job, encoder, queries_QD, ranks, store))
    return ranks.on_main(lambda: _merged(job, evaluated_Q, store))


def _queries(
    images: ImageSet, encoder: ImageEncoder, ranks: Ranks
) -> tuple[NDArray[np.int64], Tensor]:
    """(numbers, features on this rank's device) of all that can be decoded, on every rank."""
    mine = parts(range(len(images)), BLOCK)[ranks.rank :: ranks.world]
    shared = ranks.gather(ranks.together(lambda: _features(images, mine, encoder, ranks)))
    blocks = sorted((block for part in shared for block in part), key=lambda block: block[0])
    if not blocks:
        raise images.none_readable()
    numbers = [number for found, _ in blocks for number in found]
    return np.array(numbers), torch.cat([block_MD for _, block_MD in blocks]).to(ranks.device)


def _features(
    images: ImageSet, mine: list[range], encoder: ImageEncoder, ranks: Ranks
) -> list[tuple[list[int], Tensor]]:
    bar = tqdm(mine, "evaluated images", unit="block", disable=ranks.rank != 0)
    read = (images.images(block) for block in bar)
    return [(numbers, encoder.image_features(found).cpu()) for numbers, found in read if found]


def _chunks(
    job: Job, encoder: ImageEncoder, queries_QD: Tensor, ranks: Ranks, store: ChunkStore
) -> None:
    mine = list(job.chunks.items())[ranks.rank :: ranks.world]
    total = sum(len(chunk) for _, chunk in mine)
    with tqdm(total=total, desc="training images", unit="image", disable=ranks.rank != 0) as bar:
        for digest, chunk in mine:
            if digest in store:
                bar.update(len(chunk))
            else:
                store.write(digest, _nearest(job.training, encoder, queries_QD, chunk, bar))


def _nearest(
    training: ImageSet, encoder: ImageEncoder, queries_QD: Tensor, chunk: range, bar: tqdm
) -> Nearest:
    read: list[int] = []

    def features() -> Iterator[Tensor]:
        for block in parts(chunk, BLOCK):
            numbers, images = training.images(block)
            read.extend(numbers)
            if images:
                yield encoder.image_features(images)
            bar.update(len(block))

    at_Q1, similarities_Q1 = nearest_cosine(queries_QD, features(), decimals=DECIMALS)
    # Where there is none, `at` is -1, and so is the number.
    numbers_Q = np.array([*read, -1])[at_Q1[:, 0].cpu().numpy()]
    return Nearest(numbers_Q, similarities_Q1[:, 0].cpu().numpy(), len(chunk) - len(read))


def _merged(job: Job, evaluated_Q: NDArray[np.int64], store: ChunkStore) -> Found:
    nearest = functools.reduce(Nearest.merged, map(store.read, job.chunks))
    if nearest.corrupt == len(job.training):
        raise job.training.none_readable()
    found = Found(evaluated_Q, nearest)
    write_found(job.out, job.digest, found)
    store.remove(job.chunks)
    return found
