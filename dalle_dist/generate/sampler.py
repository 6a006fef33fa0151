"""Sample image tokens one after another, if so wished with classifier-free guidance.

Guidance (Ho & Salimans 2022, arXiv 2207.12598) takes the logits for a sample's caption and for the
empty caption, all pads, which the model knows by `train.caption_dropout`, and goes from the second
to the first and beyond.

Shape suffixes: B samples, C captions, T text positions, N image tokens, K codebook entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from dalle_kernels.sparse_attention import DecodeCache
from torch import Tensor

from dalle_dist.config import Config
from dalle_dist.generate.sampling_options import Sampling
from dalle_dist.text_tokenizer.protocol import PAD
from dalle_dist.transformer import checks
from dalle_dist.transformer.model import Transformer


@torch.no_grad()
def sample_codes(
    model: Transformer,
    text_BT: Tensor,
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    *,
    prefix_codes: Tensor | None = None,
) -> Tensor:
    """codes_BN, int64. `prefix_codes` [B, n] fixes the first n tokens (paper 3.3).

    Without `sampling` the options are those of the model's config. Neighbours along B with the same
    text share its keys and values, which are most of the work; with guidance all samples share
    those of the empty caption.

    Each sample has one uniform number per token from its own seed, turned into a token by the
    inverse of the cumulated probabilities: what else is in the batch does not matter.

    Raises:
        ValueError: tensors that are not the model's shapes, dtypes or ids; not a seed per sample.
    """
    _check(model, text_BT, seeds, prefix_codes)
    sampling = sampling or Sampling.of(model.config.sampling)
    tokens, device = model.config.transformer.image_tokens, text_BT.device
    uniform_BN = torch.stack([_uniforms(seed, tokens) for seed in seeds]).to(device)
    prefix = 0 if prefix_codes is None else prefix_codes.shape[1]
    caches = _prefill(model, text_BT, sampling.guided)
    codes_BN = torch.empty(len(seeds), tokens, dtype=torch.long, device=device)
    held_B = torch.full_like(codes_BN[:, 0], model.image_embedding.start)
    for position in range(tokens):
        if sampling.guided:
            both_BK = model.step(held_B.repeat(2), caches, position)
            logits_BK = guide(both_BK, sampling.guidance_at(position, tokens))
        else:
            logits_BK = model.step(held_B, caches, position)
        if prefix_codes is not None and position < prefix:
            held_B = prefix_codes[:, position]
        else:
            held_B = choose(logits_BK, uniform_BN[:, position], sampling)
        codes_BN[:, position] = held_B
    return codes_BN


def guide(both_BK: Tensor, weight: float) -> Tensor:
    """empty + weight * (captioned - empty); `both_BK` holds the captioned rows, then the empty."""
    captioned_BK, empty_BK = both_BK.chunk(2)
    return empty_BK + weight * (captioned_BK - empty_BK)


def warn_if_never_empty(config: Config, sampling: Sampling) -> None:
    """Guidance needs a model that has seen empty captions."""
    if sampling.guided and config.train.caption_dropout == 0:
        warnings.warn(
            f"guidance {sampling.guidance:g}: the model never saw an empty caption in training "
            "(train.caption_dropout 0), so that images may become worse by it",
            stacklevel=3,
        )


def choose(logits_BK: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    """One token per row, from a uniform number in [0, 1) each."""
    if sampling.temperature == 0:
        return logits_BK.argmax(dim=-1)
    probabilities_BK = (logits_BK.double() / sampling.temperature).softmax(dim=-1)
    ordered_BK, order_BK = probabilities_BK.sort(dim=-1, descending=True, stable=True)
    kept_BK = ordered_BK.cumsum(dim=-1) - ordered_BK < sampling.top_p
    if sampling.top_k:
        kept_BK[:, sampling.top_k :] = False
    cumulated_BK = (ordered_BK * kept_BK).cumsum(dim=-1)
    threshold_B1 = uniform_B[:, None] * cumulated_BK[:, -1:]
    rank_B1 = torch.searchsorted(cumulated_BK, threshold_B1, right=True)
    # Rounding may put the threshold on the very end, where only cut tokens lie.
    rank_B1 = torch.minimum(rank_B1, kept_BK.sum(dim=-1, keepdim=True) - 1)
    return order_BK.gather(1, rank_B1)[:, 0]


def _prefill(model: Transformer, text_BT: Tensor, guided: bool) -> list[DecodeCache]:
    """Caches for the samples, followed by as many of the empty caption where there is guidance."""
    text_CT, samples_C = text_BT.unique_consecutive(dim=0, return_counts=True)
    samples = samples_C.tolist()
    if guided:
        empty_1T = torch.full_like(text_CT[:1], PAD)
        text_CT, samples = torch.cat([text_CT, empty_1T]), [*samples, len(text_BT)]
    return model.prefill(text_CT, samples)


def _check(
    model: Transformer, text_BT: Tensor, seeds: Sequence[int], prefix_codes: Tensor | None
) -> None:
    checks.text_fits(text_BT, model.config)
    if not seeds or len(seeds) != len(text_BT):
        raise ValueError(f"seeds: {len(seeds)} for {len(text_BT)} rows of text; give one for each")
    if prefix_codes is None:
        return
    shape, tokens = tuple(prefix_codes.shape), model.config.transformer.image_tokens
    if prefix_codes.dtype != torch.int64:
        raise ValueError(f"prefix_codes: dtype {prefix_codes.dtype} is not int64; use .long()")
    if len(shape) != 2 or shape[0] != len(seeds) or shape[1] > tokens:
        raise ValueError(f"prefix_codes: shape {shape} is not [{len(seeds)}, up to {tokens}]")
    checks.ids_fit("prefix_codes", prefix_codes, model.config.transformer.codebook_size)


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
