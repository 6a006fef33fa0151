"""What choosing the best of N candidates by a score gives (paper, Fig. 9: N = 1, 2, 4 ... 512).

Shape suffixes: C captions, N candidates, D features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle_dist.errors import ConfigError, DataError


def counts(candidates: int) -> list[int]:
    """The powers of two up to the number of candidates."""
    return [2**power for power in range(candidates.bit_length())]


def best_of(scores_CN: Tensor, n: int) -> Tensor:
    """Which of the first `n` candidates of each caption scores highest: index_C, int64.

    Of equals the first. So the paper's curve is drawn: each N takes the first N of 512.

    Raises:
        ConfigError: `n` is not from 1 to N.
        DataError: a score is NaN.
    """
    _check(scores_CN, n)
    # The first of several; `max` leaves open which.
    return scores_CN[:, :n].argmax(dim=1)


def choose(features_CND: Tensor, index_C: Tensor) -> Tensor:
    """Those of the chosen candidates: features_CD."""
    return features_CND[torch.arange(len(index_C), device=index_C.device), index_C]


def best_of_curve(scores_CN: Tensor, measures_CN: Tensor) -> dict[int, float]:
    """Mean measure of the best of the first n, by n; errors as `best_of`."""
    found = {}
    for n in counts(scores_CN.shape[1]):
        found[n] = choose(measures_CN.double(), best_of(scores_CN, n)).mean().item()
    return found


def expected_best_of(scores_CN: Tensor, measures_CN: Tensor, n: int) -> float:
    """Mean measure of the best of `n`, over captions and all subsets of `n` of the N candidates.

    Unbiased for a fresh draw of `n` candidates, and with less variance than the first `n` have. The
    candidate above k others is the best of C(k, n - 1) of C(N, n) subsets. Errors as `best_of`.
    """
    _check(scores_CN, n)
    total = scores_CN.shape[1]
    order_CN = scores_CN.sort(dim=1, descending=True, stable=True).indices.flip(1)
    subsets = math.comb(total, n)
    weights_N = torch.tensor(
        # Integers of hundreds of digits: divided as such, they leave an exact quotient.
        [math.comb(below, n - 1) / subsets for below in range(total)],
        dtype=torch.float64,
        device=measures_CN.device,
    )
    return (measures_CN.double().gather(1, order_CN) @ weights_N).mean().item()


def _check(scores_CN: Tensor, n: int) -> None:
    if not 1 <= n <= scores_CN.shape[1]:
        raise ConfigError(f"best of {n}: from 1 to {scores_CN.shape[1]} candidates")
    if scores_CN.isnan().any():
        raise DataError("a candidate's score is NaN")
