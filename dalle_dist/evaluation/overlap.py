"""Which images of an evaluation set have a near copy in a training set (paper 3.2).

The paper looks up nearest neighbours by the features of a contrastive model, and removes what a
person finds to be above a threshold of similarity. Training sets are read chunk by chunk, so that
memory holds one chunk and k neighbours of each image.

Shape suffixes: Q images of the evaluation set, M images of a chunk, D features, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_dist.errors import DataError


def nearest_cosine(
    queries_QD: Tensor, chunks: Iterable[Tensor], k: int = 1, decimals: int | None = None
) -> tuple[Tensor, Tensor]:
    """(indices_QK int64, similarities_QK float32) of the `k` most similar to each, best first.

    The similarity is the cosine of features, -1 to 1. -1 and -infinity where there are fewer than
    `k`. Of equally similar ones the first comes first.

    Args:
        chunks: features_MD; indices count through all chunks.
        decimals: of the similarities, which are rounded before they are compared.

    Raises DataError: a chunk has another number of features, or a value is not finite.
    """
    queries_QD = _unit(queries_QD)
    shape, device = (len(queries_QD), k), queries_QD.device
    indices_QK = torch.full(shape, -1, device=device)
    best_QK = torch.full(shape, -torch.inf, device=device)
    start = 0
    for chunk_MD in chunks:
        if chunk_MD.shape[1] != queries_QD.shape[1]:
            raise DataError(f"{chunk_MD.shape[1]} features, looked up are {queries_QD.shape[1]}")
        similar_QM = queries_QD @ _unit(chunk_MD.to(device)).T
        if decimals is not None:
            similar_QM = similar_QM.round(decimals=decimals)
        found_QK, at_QK = _top(similar_QM, min(k, len(chunk_MD)))
        best_QK, order_QK = _top(torch.cat([best_QK, found_QK], dim=1), k)
        indices_QK = torch.cat([indices_QK, start + at_QK], dim=1).gather(1, order_QK)
        start += len(chunk_MD)
    return indices_QK, best_QK


def _top(similar_QM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row and where they are; topk may take any of equal ones."""
    if k == 1:
        values_Q1, at_Q1 = similar_QM.max(dim=1, keepdim=True)
        return values_Q1, at_Q1
    values_QM, at_QM = similar_QM.sort(dim=1, descending=True, stable=True)
    return values_QM[:, :k], at_QM[:, :k]


def _unit(features_MD: Tensor) -> Tensor:
    if not features_MD.isfinite().all():
        raise DataError("features that are not finite cannot be looked up")
    return F.normalize(features_MD.float(), dim=1)
