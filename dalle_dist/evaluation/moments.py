"""Mean and covariance of features, in float64, over batches of any size and over ranks.

Deviations are summed about the mean of what was seen so far (Chan, Golub and LeVeque 1979), as
sums of products about zero would cancel where means are large.

Shape suffixes: B batch, D features.
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


class Moments:
    """What is kept of features: their number, mean and sum of squared deviations."""

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
        self._include(len(batch_BD), mean_D, deviations_BD.T @ deviations_BD)

    def merge(self, other: Moments) -> None:
        """Count what `other` has counted."""
        self._include(other.count, other.mean_D, other.scatter_DD)

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
        return Gaussian(self.mean_D.clone(), self.scatter_DD / (self.count - 1), self.count)

    def _include(self, count: int, mean_D: Tensor, scatter_DD: Tensor) -> None:
        total = self.count + count
        shift_D = mean_D - self.mean_D
        share = count / max(total, 1)
        self.scatter_DD += scatter_DD
        self.scatter_DD.addr_(shift_D, shift_D, alpha=self.count * share)
        self.mean_D += share * shift_D
        self.count = total
