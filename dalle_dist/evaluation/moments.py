"""Mean and covariance of features, in float64, over batches of any size and over ranks.

Deviations are summed about the mean of what was seen so far (Chan, Golub and LeVeque 1979), as
sums of products about zero would cancel where means are large.

Shape suffixes: B batch, D features, S those of a strip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import DataError


@dataclass(frozen=True)
class Gaussian:
    """mean_D and covariance_DD (divided by count - 1), float64; `count` samples, None: unknown."""

    mean_D: Tensor
    covariance_DD: Tensor
    count: int | None = None


STRIP = 256  # rows of the symmetric sum whose products are taken at once


class Moments:
    """What is kept of features: their number, mean and sum of products of deviations.

    Of the sum, which is symmetric, only the upper triangle counts: half of the products.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean_D = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter_DD = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features_BD: Tensor) -> None:
        """Count a batch of any float dtype. Raises DataError: a value is not finite."""
        if not features_BD.isfinite().all():
            raise DataError("features that are not finite: is the feature network's file damaged?")
        batch_BD = features_BD.to(self.mean_D)
        mean_D = batch_BD.mean(dim=0) if len(batch_BD) else self.mean_D
        deviations_BD = batch_BD - mean_D
        for first in range(0, len(mean_D), STRIP):
            strip_BS = deviations_BD[:, first : first + STRIP]
            self.scatter_DD[first : first + STRIP, first:].addmm_(
                strip_BS.T, deviations_BD[:, first:]
            )
        self._shift(len(batch_BD), mean_D)

    def merge(self, other: Moments) -> None:
        """Count what `other` has counted."""
        self.scatter_DD += other.scatter_DD
        self._shift(other.count, other.mean_D)

    def merge_ranks(self, ranks: Ranks) -> None:
        """Count what all ranks have counted, on every rank; a collective call.

        The moments lie on the rank's device.
        """
        total = torch.tensor([self.count], dtype=torch.int64, device=self.mean_D.device)
        ranks.sum_tensor(total)
        mean_D = self.mean_D * self.count / total.clamp_min(1)
        ranks.sum_tensor(mean_D)
        shift_D = self.mean_D - mean_D
        self.scatter_DD.addr_(shift_D, shift_D, alpha=self.count)
        ranks.sum_tensor(self.scatter_DD)
        self.count, self.mean_D = int(total), mean_D

    def gaussian(self) -> Gaussian:
        """Raises DataError: fewer than two samples have no covariance."""
        if self.count < 2:
            raise DataError(f"{self.count} images: a covariance takes at least 2")
        upper_DD = self.scatter_DD.triu() / (self.count - 1)
        return Gaussian(self.mean_D.clone(), upper_DD + upper_DD.triu(1).T, self.count)

    def _shift(self, count: int, mean_D: Tensor) -> None:
        """Let the sum be about the mean that `count` more samples of mean `mean_D` make."""
        total = self.count + count
        shift_D = mean_D - self.mean_D
        share = count / max(total, 1)
        self.scatter_DD.addr_(shift_D, shift_D, alpha=self.count * share)
        self.mean_D += share * shift_D
        self.count = total
