"""Sample image tokens, if so wished with classifier-free guidance.

Guidance (Ho & Salimans 2022, arXiv 2207.12598) takes the logits for a sample's caption and for the
empty caption, all pads, which the model knows by `train.caption_dropout`, and goes from the second
to the first and beyond.

Shape suffixes: B samples, C captions, T text positions, N image tokens, n tokens of a prefix,
K codebook entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_dist.config import Config
from dalle_dist.generate.noise import gumbel
from dalle_dist.generate.sampling_options import Sampling
from dalle_dist.text_tokenizer.protocol import PAD
from dalle_dist.transformer import checks
from dalle_dist.transformer.protocol import TextImageTransformer

FREE = -1  # in kept codes: a token that is to be sampled


@torch.no_grad()
def sample_codes(
    model: TextImageTransformer,
    text_BT: Tensor,
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    *,
    kept_codes: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """codes_BN, int64.

    Each token's noise depends on its sample's seed and its position alone (`noise.py`): what else
    is in the batch does not matter. Neighbours along B with the same text and the same prefix share
    its keys and values, which are most of the work; with guidance all samples with the same prefix
    share those of the empty caption.

    Args:
        seeds: one for each sample, up to 64 bits.
        sampling: None: the options of the model's config.
        kept_codes: [B, N], int64: tokens that are given, `FREE` where one is to be sampled. Tokens
            look at those before them alone: what is kept further on does not change them. Leading
            tokens that all samples keep are run as one block (paper 3.3).
        window: tokens that are guessed and run at once (`windowed.py`); None: one by one. The
            tokens are the same.

    Raises:
        ValueError: tensors that are not the model's shapes, dtypes or ids; not a seed per sample.
    """
    _check(model, text_BT, seeds, kept_codes, window)
    draw = Draw(model, text_BT, seeds, sampling or Sampling.of(model.config.sampling), kept_codes)
    if window is None:
        from dalle_dist.generate.sequential import sample_sequence

        return sample_sequence(draw)
    from dalle_dist.generate.windowed import sample_windows

    return sample_windows(draw, window).codes_BN


class Draw:
    """What both ways to sample have in common: the samples, and how logits become their tokens.

    prefix  leading tokens that all samples keep
    """

    def __init__(
        self,
        model: TextImageTransformer,
        text_BT: Tensor,
        seeds: Sequence[int],
        sampling: Sampling,
        kept_codes: Tensor | None = None,
    ) -> None:
        self.model, self.text_BT, self.sampling = model, text_BT, sampling
        self.tokens, device = model.config.transformer.image_tokens, text_BT.device
        self.seed_B = torch.tensor([_signed(seed) for seed in seeds], device=device)
        shape = (len(seeds), self.tokens)
        self.kept_BN = torch.full(shape, FREE, device=device) if kept_codes is None else kept_codes
        free_N = (self.kept_BN == FREE).any(dim=0)
        self.prefix = int(free_N.long().argmax()) if bool(free_N.any()) else self.tokens
        weights = [sampling.guidance_at(position, self.tokens) for position in range(self.tokens)]
        self.guidance_N = torch.tensor(weights, device=device)

    def prefill(self, window: int | None = None) -> list[Any]:
        """Caches for the samples, followed by as many of the empty caption if there is guidance."""
        rows_Bn = torch.cat([self.text_BT, self.kept_BN[:, : self.prefix]], dim=1)
        if self.sampling.guided:
            empty_BT = torch.full_like(self.text_BT, PAD)
            prefix_Bn = self.kept_BN[:, : self.prefix]
            rows_Bn = torch.cat([rows_Bn, torch.cat([empty_BT, prefix_Bn], dim=1)])
        rows_Cn, samples_C = rows_Bn.unique_consecutive(dim=0, return_counts=True)
        text_CT, prefix_Cn = rows_Cn.split([self.text_BT.shape[1], self.prefix], dim=1)
        return self.model.prefill(text_CT, samples_C.tolist(), prefix_Cn, window)

    def logits(self, held_BN: Tensor, caches: list[Any], at: int | Tensor) -> Tensor:
        """logits_BNK of `TextImageTransformer.step`, guided if so wished."""
        if not self.sampling.guided:
            return self.model.step(held_BN, caches, at)
        both = at.repeat(2) if isinstance(at, Tensor) and at.ndim else at
        both_BNK = self.model.step(held_BN.repeat(2, 1), caches, both)
        ahead_N = torch.arange(held_BN.shape[1], device=held_BN.device)
        at_BN = torch.as_tensor(at, device=held_BN.device).reshape(-1, 1) + ahead_N
        return guide(both_BNK, self.guidance_N[at_BN.clamp(max=self.tokens - 1)][:, :, None])

    def noise(self, sample_M: Tensor, position_M: Tensor) -> Tensor:
        """Gumbel noise_MK of some samples' tokens."""
        codes = self.model.config.transformer.codebook_size
        return gumbel(self.seed_B[sample_M], position_M, codes)


def guide(both: Tensor, weight: float | Tensor) -> Tensor:
    """empty + weight * (captioned - empty); `both` holds the captioned rows, then the empty."""
    captioned, empty = both.chunk(2)
    return empty + weight * (captioned - empty)


def warn_if_never_empty(config: Config, sampling: Sampling) -> None:
    """Guidance needs a model that has seen empty captions."""
    if sampling.guided and config.train.caption_dropout == 0:
        warnings.warn(
            f"guidance {sampling.guidance:g}: the model never saw an empty caption in training "
            "(train.caption_dropout 0), so that images may become worse by it",
            stacklevel=3,
        )


def choose(logits_BK: Tensor, noise_BK: Tensor, sampling: Sampling) -> Tensor:
    """One token per row, from standard Gumbel noise: a sample of the softmax of what is kept."""
    if sampling.temperature == 0:
        return logits_BK.argmax(dim=-1)
    logits_BK = logits_BK / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        logits_BK = logits_BK.masked_fill(~_kept(logits_BK, sampling), -torch.inf)
    return (logits_BK + noise_BK).argmax(dim=-1)


def _kept(logits_BK: Tensor, sampling: Sampling) -> Tensor:
    """Which tokens top-k and top-p leave, of logits that the temperature has divided."""
    probabilities_BK = logits_BK.double().softmax(dim=-1)
    ordered_BK, order_BK = probabilities_BK.sort(dim=-1, descending=True, stable=True)
    kept_BK = ordered_BK.cumsum(dim=-1) - ordered_BK < sampling.top_p
    if sampling.top_k:
        kept_BK[..., sampling.top_k :] = False
    return torch.zeros_like(kept_BK).scatter(-1, order_BK, kept_BK)


def _signed(seed: int) -> int:
    """64 bits as torch's int64."""
    return (seed + 2**63) % 2**64 - 2**63


def _check(
    model: TextImageTransformer,
    text_BT: Tensor,
    seeds: Sequence[int],
    kept_codes: Tensor | None,
    window: int | None,
) -> None:
    checks.text_fits(text_BT, model.config)
    if not seeds or len(seeds) != len(text_BT):
        raise ValueError(f"seeds: {len(seeds)} for {len(text_BT)} rows of text; give one for each")
    if window is not None and window < 1:
        raise ValueError(f"window: {window} is below 1")
    if kept_codes is None:
        return
    shape, tokens = tuple(kept_codes.shape), model.config.transformer.image_tokens
    if kept_codes.dtype != torch.int64:
        raise ValueError(f"kept_codes: dtype {kept_codes.dtype} is not int64; use .long()")
    if shape != (len(seeds), tokens):
        raise ValueError(f"kept_codes: shape {shape} is not ({len(seeds)}, {tokens})")
    classes = model.config.transformer.codebook_size
    checks.ids_fit("kept_codes", kept_codes[kept_codes != FREE], classes)
