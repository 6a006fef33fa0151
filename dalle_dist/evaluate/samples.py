"""Candidates for the captions of a set, kept on disk, and the best of the first n of each.

Shape suffixes: C captions, N candidates, B of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from dalle_dist.evaluate.rows import gathered
from dalle_dist.evaluate.subject import Subject
from dalle_dist.evaluation.rerank import best_of
from dalle_dist.generate.candidates import CandidateStore
from dalle_dist.generate.generator import Generator
from dalle_dist.generate.job import Candidates, Job, sample
from dalle_dist.generate.request import Request, Settings

# Inside OUT. They stay there, so that a call that was cut off, or that asks for other measures of
# the same images, samples nothing twice.
FOLDER = "candidates"


class Samples:
    """Sampled by all ranks when made, a collective call; on every rank the same afterwards.

    numbers    of the captions, in the set
    captions   C of them
    scores_CN  by which the best are chosen; without a chooser zeros, so that the first is
    """

    def __init__(self, subject: Subject, generator: Generator, settings: Settings) -> None:
        options, ranks = subject.options, subject.ranks
        self._subject, self._generator = subject, generator
        self.numbers = subject.data.chosen(options.captions)
        self.captions = [subject.data.captions[i] for i in self.numbers]
        request = Request(self.captions, options.candidates, settings)
        job = Job(
            request, options.out, options.candidates, subject.chooser, options.batch_size
        )  # fmt: skip
        store = CandidateStore(options.out, FOLDER)
        ranks.together(lambda: sample(job, generator, ranks, store))
        self._candidates = Candidates(job, store)
        self.scores_CN: Tensor = ranks.broadcast(gathered(ranks, len(self.captions), self._scores))

    def winners(self, n: int) -> list[int]:
        """Of each caption the best of its first `n` candidates."""
        found: list[int] = best_of(self.scores_CN, n).tolist()
        return found

    def images(self, captions: Sequence[int], candidates: Sequence[int]) -> list[Image.Image]:
        """One candidate of each of these captions, prepared for a comparison."""
        codes_BN = torch.stack(
            [
                self._candidates.codes(caption, candidate)
                for caption, candidate in zip(captions, candidates, strict=True)
            ]
        )
        return [self._subject.preparation(image) for image in self._generator.images(codes_BN)]

    def _scores(self, numbers: range) -> Tensor:
        found = [self._candidates(caption).scores_B for caption in numbers]
        zeros = torch.zeros(self._subject.options.candidates)
        return torch.stack([zeros if scores is None else scores for scores in found])
