"""Inception score (Salimans et al. 2016, arXiv 1606.03498): exp of the mean KL(p(y|x) || p(y)).

1 where all images have the same probabilities; the number of classes where each is certain and all
are equally frequent. The mean and deviation over splits, whose members are drawn by a fixed seed
from all images by index: so neither batches, nor ranks, nor an order by class change the figure.
The permutation and the bounds of splits are torch-fidelity's at its defaults.

Shape suffixes: B batch, S splits, K classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import ConfigError, DataError

SPLITS, SEED = 10, 2020


class InceptionScore:
    """Sums over the images of each split; their number does not depend on that of images.

    Args:
        count: images in all, over all ranks.
        classes: K of their probabilities.

    Raises ConfigError: fewer images than splits, or no split.
    """

    def __init__(self, count: int, classes: int, splits: int = SPLITS) -> None:
        if not 1 <= splits <= count:
            raise ConfigError(f"{count} images cannot be split into {splits} parts")
        order = torch.from_numpy(np.random.RandomState(SEED).permutation(count))
        self._due_S = torch.tensor(
            [(s + 1) * count // splits - s * count // splits for s in range(splits)]
        )
        self._split_of = torch.empty(count, dtype=torch.int64)
        self._split_of[order] = torch.arange(splits).repeat_interleave(self._due_S)
        # Of each split: probabilities by class, then sum of p ln p, then the number of images.
        self._sums_SK = torch.zeros(splits, classes + 2, dtype=torch.float64)

    def add(self, indices_B: Tensor, probabilities_BK: Tensor) -> None:
        """Count images by their index among all, each once. Raises DataError: no probabilities."""
        found_BK = probabilities_BK.double().cpu()
        # Rows of logits do not sum to 1, and NaN compares as false.
        if not ((found_BK.sum(dim=1) - 1).abs() < 1e-3).all() or (found_BK < 0).any():
            raise DataError("class probabilities that do not sum to 1, or are negative")
        plogp_B1 = -torch.special.entr(found_BK).sum(dim=1, keepdim=True)
        rows_BK = torch.cat([found_BK, plogp_B1, torch.ones_like(plogp_B1)], dim=1)
        self._sums_SK.index_add_(0, self._split_of[indices_B.cpu()], rows_BK)

    def merge_ranks(self, ranks: Ranks) -> None:
        """Count what all ranks have counted, on every rank; a collective call."""
        sums_SK = self._sums_SK.to(ranks.device)
        ranks.sum_tensor(sums_SK)
        self._sums_SK = sums_SK.cpu()

    def result(self) -> tuple[float, float]:
        """(mean, population deviation) over splits. Raises DataError: not all images counted."""
        counts_S = self._sums_SK[:, -1]
        if not counts_S.equal(self._due_S.double()):
            due, found = len(self._split_of), int(counts_S.sum())
            raise DataError(f"inception score: {found} of {due} images, or some of them twice")
        means_SK = self._sums_SK / counts_S[:, None]
        entropy_S = torch.special.entr(means_SK[:, :-2]).sum(dim=1)
        scores_S = (means_SK[:, -2] + entropy_S).exp()
        return scores_S.mean().item(), scores_S.std(correction=0).item()
