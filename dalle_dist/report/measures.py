"""Figures of a finished run on held-out images."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor

from dalle_dist.data.token_dataset import TokenDataset
from dalle_dist.generate.generator import Generator
from dalle_dist.generate.request import sample_seed
from dalle_dist.metrics.caption_gain import caption_losses
from dalle_dist.metrics.codes import code_counts, entropy, share_in_use
from dalle_dist.metrics.identification import distances, identify, sample_images, summary
from dalle_dist.metrics.reconstruction import psnr, ssim
from dalle_dist.report.inputs import TRAINING_IMAGES, HeldOut, words_of

IDENTIFIED = 512  # captions of the identification, at most
CODES_IN_USE = "share of codes in use"


def reconstruction_figures(
    generator: Generator, held_out: HeldOut, train: TokenDataset
) -> dict[str, Any]:
    """Of the image tokenizer: its reconstructions of held-out images, its codes of many images."""
    codebook_size = generator.config.transformer.codebook_size
    counts_K = code_counts(held_out.codes_BN, codebook_size)
    for i in range(min(len(train), TRAINING_IMAGES)):
        counts_K += code_counts(train[i].codes, codebook_size)
    images_BCHW = held_out.images_BCHW.float() / 255
    reconstructed_BCHW = held_out.reconstructed(generator.image_tokenizer)
    psnr_B, ssim_B = (f(images_BCHW, reconstructed_BCHW) for f in (psnr, ssim))
    return {
        "held-out images": len(held_out.captions),
        "PSNR of reconstructions, dB (mean over images)": round(psnr_B.mean().item(), 2),
        "SSIM of reconstructions (mean over images)": round(ssim_B.mean().item(), 3),
        CODES_IN_USE: round(share_in_use(counts_K), 3),
        "perplexity of the codes": round(math.exp(entropy(counts_K)), 1),
    }


def caption_figures(generator: Generator, held_out: HeldOut, seed: int) -> dict[str, Any]:
    """Image losses with the right captions and with shuffled ones."""
    losses = caption_losses(generator.model, held_out.text_BT, held_out.codes_BN, seed=seed)
    return {
        "image loss, right caption, nats/token": round(losses.right, 3),
        "image loss, captions shuffled, nats/token": round(losses.shuffled, 3),
        "what the caption is worth, nats/token": round(losses.gain, 3),
    }


def sample_captions(generator: Generator, held_out: HeldOut, seed: int) -> Tensor:
    """One image for each of the first held-out captions: images_BCHW, floats in [0, 1].

    By the release's sampling options; the first that `Generator.generate` makes of the caption.
    """
    captions = held_out.captions[:IDENTIFIED]
    return sample_images(
        generator.model,
        generator.image_tokenizer,
        held_out.text_BT[: len(captions)],
        [sample_seed(seed, caption, 0) for caption in captions],
    )


def identification_figures(
    generated_BCHW: Tensor, held_out: HeldOut, nearest_B: Tensor, words: Set[str]
) -> dict[str, Any]:
    """Whether samples are nearest to their captions' true images, and nearer to what was learnt.

    Args:
        generated_BCHW: one of each of the first captions, in [0, 1].
        nearest_B: distance from each, as an 8-bit image, to the nearest training image.
        words: of the training captions.
    """
    true_BCHW = held_out.images_BCHW[: len(generated_BCHW)]
    ranks_B = identify(generated_BCHW, true_BCHW.float() / 255)
    found = summary(ranks_B)
    pairs = zip(to_bytes(generated_BCHW).split(1), true_BCHW.split(1), strict=True)
    true_B = torch.cat([distances(*pair)[0] for pair in pairs])
    nearer = (nearest_B < true_B).double().mean().item()
    return {
        "identification R@1": round(found["r1"], 3),
        "identification R@10": round(found["r10"], 3),
        "identification, median rank": found["rank"],
        **_known_words(ranks_B, held_out.captions, words),
        "share of samples nearer to a training image than to the true one": round(nearer, 3),
    }


def _known_words(ranks_B: Tensor, captions: Sequence[str], words: Set[str]) -> dict[str, float]:
    """Nobody can tell what a word means that no caption of the training set has."""
    known_B = torch.tensor([words_of(caption) <= words for caption in captions[: len(ranks_B)]])
    share = known_B.double().mean().item()
    figures = {"share of captions all of whose words were trained on": round(share, 3)}
    if 0 < share < 1:
        found = summary(ranks_B[known_B])
        figures["identification R@1, these captions"] = round(found["r1"], 3)
        figures["identification R@10, these captions"] = round(found["r10"], 3)
    return figures


def to_bytes(images_BCHW: Tensor) -> Tensor:
    """Floats in [0, 1] (clamped) to uint8, as images are saved."""
    return (images_BCHW.float().clamp(0, 1) * 255).round().byte()
