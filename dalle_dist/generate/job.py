"""A request of any size to files: on one process or many, cut off and begun again.

First all candidates are sampled, batch by batch, and scored if some are to be chosen; each finished
batch is kept (`candidates.py`). Then the images that stay are decoded and written. Ranks share both
parts: batches in turn, then prompts in turn. An image does not depend on how, so that any number of
processes gives the same files.

Shape suffixes: B candidates of a batch, N image tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dalle_dist.distributed.process_group import Ranks
from dalle_dist.generate.candidates import Batch, CandidateStore
from dalle_dist.generate.generator import Generator
from dalle_dist.generate.outputs import check_folder, write_images, write_manifest
from dalle_dist.generate.request import Entry, Request
from dalle_dist.generate.shards import refuse_other_shards, write_shard_index, write_shards

DECODED = 16  # images at once, whatever the batch: pixels then depend on no option
DIGITS = 4  # of a score


class Scorer(Protocol):
    """How well images fit their captions; `dalle_dist.clip.scorer.CLIPScorer` is one."""

    @property
    def fingerprint(self) -> str: ...

    def score(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """scores_B, fp32; more is better."""


@dataclass(frozen=True)
class Job:
    """A request and how it is carried out, which changes no image.

    out         folder, local or remote
    keep        images of each prompt that are written: those of the highest scores
    scorer      None: candidates are not scored, and all are kept
    batch_size  candidates that are sampled at once
    window      as in `Generator.generate`
    tar         tar shards instead of PNGs
    """

    request: Request
    out: str
    keep: int
    scorer: Scorer | None = None
    batch_size: int = 64
    window: int | None = None
    tar: bool = False


def run(job: Job, generator: Generator, ranks: Ranks) -> int:
    """Carry out a job; returns how many images were written, by all ranks.

    Raises:
        UserError: the folder holds something else.
    """
    check = refuse_other_shards if job.tar else check_folder
    ranks.on_main(lambda: check(job.out))
    store = CandidateStore(job.out)
    ranks.together(lambda: sample(job, generator, ranks, store))
    images = _Images(job, generator, store)
    if job.tar:
        shards = ranks.together(lambda: write_shards(job.out, job.request, job.keep, images, ranks))
        found = [shard for part in ranks.gather_on_main(shards) for shard in part]
        ranks.on_main(lambda: write_shard_index(job.out, job.request, job.keep, found))
    else:
        made = ranks.together(lambda: _write_images(job, images, ranks))
        entries = dict(sorted(item for part in ranks.gather_on_main(made) for item in part.items()))
        ranks.on_main(lambda: write_manifest(job.out, _merged(entries.values())))
    ranks.on_main(lambda: store.remove(_digest(job, numbers) for numbers in _batches(job)))
    return len(job.request.prompts) * job.keep


def _write_images(job: Job, images: _Images, ranks: Ranks) -> dict[int, dict[str, Entry]]:
    """Manifest's entries by file name, by number of the prompt."""
    mine = range(ranks.rank, len(job.request.prompts), ranks.world)
    return {prompt: write_images(job.out, images(prompt)) for prompt in mine}


def _merged(entries: Iterable[dict[str, Entry]]) -> dict[str, Entry]:
    return {name: entry for part in entries for name, entry in part.items()}


def _batches(job: Job) -> list[range]:
    starts = range(0, len(job.request), job.batch_size)
    return [range(s, min(s + job.batch_size, len(job.request))) for s in starts]


def sample(job: Job, generator: Generator, ranks: Ranks, store: CandidateStore) -> None:
    """This rank's part of the candidates, into the store; what lies there is not sampled again."""
    mine = _batches(job)[ranks.rank :: ranks.world]
    total = sum(len(numbers) for numbers in mine)
    with tqdm(total=total, desc="candidates", unit="image", disable=ranks.rank != 0) as bar:
        for numbers in mine:
            digest = _digest(job, numbers)
            if digest not in store:
                store.write(digest, _batch(job, generator, numbers))
            bar.update(len(numbers))


def _digest(job: Job, numbers: range) -> str:
    scored = "" if job.scorer is None else f"-{job.scorer.fingerprint}"
    return job.request.digest(numbers) + scored


def _batch(job: Job, generator: Generator, numbers: range) -> Batch:
    wanted = [job.request[number] for number in numbers]
    codes_BN = generator.codes(wanted, job.request.settings, job.window)
    scores_B = None
    if job.scorer is not None:
        prompts = [prompt for prompt, _ in wanted]
        scores_B = job.scorer.score(generator.images(codes_BN), prompts).double().cpu()
        # Sums of another batch are rounded otherwise: what is left tells images apart all the same.
        scores_B = scores_B.round(decimals=DIGITS)
    return Batch(codes_BN.cpu(), scores_B)


class Candidates:
    """What `sample` has put into a store, by all ranks, prompt by prompt."""

    def __init__(self, job: Job, store: CandidateStore) -> None:
        self._job, self._store = job, store
        self._last: tuple[str, Batch] | None = None

    def __call__(self, prompt: int) -> Batch:
        """All candidates of the prompt with this number, in the order of their indices."""
        count, size = self._job.request.candidates, self._job.batch_size
        numbers = range(prompt * count, (prompt + 1) * count)
        parts = []
        for start in range(numbers[0] // size * size, numbers[-1] + 1, size):
            batch = self._batch(start)
            inside = slice(max(numbers[0] - start, 0), numbers[-1] + 1 - start)
            scores_B = None if batch.scores_B is None else batch.scores_B[inside]
            parts.append((batch.codes_BN[inside], scores_B))
        codes, scores = zip(*parts, strict=True)
        return Batch(torch.cat(codes), None if scores[0] is None else torch.cat(scores))

    def codes(self, prompt: int, index: int) -> Tensor:
        """codes_N of one candidate, for which one batch is read."""
        number, size = prompt * self._job.request.candidates + index, self._job.batch_size
        return self._batch(number // size * size).codes_BN[number % size]

    def _batch(self, start: int) -> Batch:
        whole = range(start, min(start + self._job.batch_size, len(self._job.request)))
        digest = _digest(self._job, whole)
        if self._last is None or self._last[0] != digest:
            self._last = digest, self._store.read(digest)
        return self._last[1]


class _Images:
    """The images that stay, prompt by prompt, best first where they are scored."""

    def __init__(self, job: Job, generator: Generator, store: CandidateStore) -> None:
        self._job, self._generator = job, generator
        self._candidates = Candidates(job, store)

    def __call__(self, prompt: int) -> list[tuple[Entry, Image.Image]]:
        """(manifest's entry, image) of each that stays of the prompt with this number."""
        count = self._job.request.candidates
        numbers = range(prompt * count, (prompt + 1) * count)
        found = self._candidates(prompt)
        order = torch.arange(count)
        if found.scores_B is not None:
            # Stable: of equal scores the lower index.
            order = found.scores_B.argsort(descending=True, stable=True)
        kept = order[: self._job.keep].tolist()
        images = [
            image
            for part in found.codes_BN[kept].split(DECODED)
            for image in self._generator.images(part)
        ]
        entries = [self._entry(numbers[i], rank, i, found.scores_B) for rank, i in enumerate(kept)]
        return list(zip(entries, images, strict=True))

    def _entry(self, number: int, rank: int, own: int, scores_B: Tensor | None) -> Entry:
        entry = self._job.request.entry(number)
        if scores_B is None or self._job.scorer is None:
            return entry
        scored = {"score": round(scores_B[own].item(), DIGITS), "rank": rank + 1}
        return entry | scored | {"scored_by": self._job.scorer.fingerprint}
