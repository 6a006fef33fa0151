"""What the image tokenizer loses, and which codes it uses.

Shape suffixes: B images of a chunk, C channels, H and W pixels, N image tokens, V values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle_dist.data.labelled_grid import to_image
from dalle_dist.evaluate.distances import Distances
from dalle_dist.evaluate.figures import Figure
from dalle_dist.evaluate.rows import gathered
from dalle_dist.evaluate.subject import Subject
from dalle_dist.evaluation.lpips import Lpips
from dalle_dist.image_tokenizer.protocol import ImageTokenizer
from dalle_dist.metrics.codes import code_counts, entropy, share_in_use
from dalle_dist.metrics.reconstruction import psnr, ssim


def tokenizer_figures(subject: Subject, distances: Sequence[Distances]) -> list[Figure]:
    """Of the reconstructions of all images of the set; a collective call, figures on rank 0."""
    ranks, count = subject.ranks, len(subject.data)
    rows = gathered(ranks, count, _measures(subject))
    found = ranks.on_main(lambda: _figures(rows, subject))
    for network in distances:
        parts = gathered(ranks, count, network.rows(_reconstructions(subject), 0))
        name = f"r{network.network.figure}"
        found += ranks.on_main(partial(network.figures, parts, 0, name))
    return found


def _measures(subject: Subject) -> Callable[[range], Tensor]:
    """Of each image PSNR, SSIM, LPIPS where there is one, then its codes: rows_BV, float64."""

    def rows(numbers: range) -> Tensor:
        images_BCHW = subject.originals(numbers)
        codes_BN = subject.image_tokenizer.encode(images_BCHW)
        made_BCHW = subject.image_tokenizer.decode(codes_BN).cpu()
        columns = [psnr(images_BCHW, made_BCHW), ssim(images_BCHW, made_BCHW)]
        if subject.lpips is not None:
            columns.append(subject.lpips(images_BCHW, made_BCHW))
        return torch.cat([torch.stack(columns, dim=1), codes_BN.double().cpu()], dim=1)

    return rows


def _reconstructions(subject: Subject) -> Callable[[range], list[Image.Image]]:
    def images(numbers: range) -> list[Image.Image]:
        return [
            subject.preparation(image)
            for image in reconstructed(subject.image_tokenizer, subject.originals(numbers))
        ]

    return images


def reconstructed(tokenizer: ImageTokenizer, images_BCHW: Tensor) -> list[Image.Image]:
    """Images, floats in [0, 1], through the tokenizer's codes."""
    return [to_image(image_CHW) for image_CHW in tokenizer.decode(tokenizer.encode(images_BCHW))]


def _figures(rows_BV: Tensor, subject: Subject) -> list[Figure]:
    tokens = subject.image_tokenizer.grid**2
    measures_BV, codes_BN = rows_BV.tensor_split([rows_BV.shape[1] - tokens], dim=1)
    counts_K = code_counts(codes_BN.long(), subject.image_tokenizer.codebook_size)
    psnr_, ssim_, *lpips = measures_BV.mean(dim=0).tolist()
    shared: dict[str, Any] = {
        "images": len(rows_BV),
        "preparation": subject.own_preparation.to_json(),
    }
    size = f"of {subject.image_tokenizer.codebook_size:,}"
    found = [
        Figure("PSNR of reconstructions", psnr_, "dB", **shared),
        Figure("SSIM of reconstructions", ssim_, **shared),
    ]
    for value in lpips:
        assert subject.lpips is not None
        digest = subject.lpips.fingerprint
        found.append(
            Figure(
                "LPIPS of reconstructions",
                value,
                network=Lpips.name,
                fingerprint=digest,
                **shared,
            )
        )
    return [
        *found,
        Figure("share of codes in use", share_in_use(counts_K), note=size, **shared),
        Figure("perplexity of the codes", math.exp(entropy(counts_K)), note=size, **shared),
    ]
