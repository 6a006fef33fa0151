"""The tokens that sampling one by one gives, in fewer steps: guesses for a window, run at once.

Given its noise, a token is a function of those before it (`noise.py`). So all tokens of a window
are computed from guesses of one another; those up to and including the first that differs from its
guess have seen what they would have seen one by one, and are final. The others are the next
guesses: a Jacobi iteration, which has the sequential result as its only fixed point (Song et al.
2021, arXiv 2002.03629; Teng et al. 2024, arXiv 2410.01699). Each sample advances at its own pace.

Shape suffixes: B samples, W positions of the window, N image tokens, X image tokens and what the
last windows reach over, M guesses, K codebook entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_dist.generate.sampler import FREE, Draw, choose
from dalle_dist.generate.sampling_options import Sampling

# Rows of a matrix product that cost hardly more than one, since loading the weights takes longer.
# Measured on CPUs; a GPU's graph of single steps is quicker than windows (docs/log.md).
CHEAP_ROWS = {"cpu": 32}
LARGEST, SMALLEST = 16, 4  # windows beyond which few guesses are right, and which gain nothing


def best_window(device: torch.device, samples: int, sampling: Sampling) -> int:
    """The window that is about the quickest for a batch of `samples`; 1: one by one."""
    rows = samples * (2 if sampling.guided else 1)
    window = min(LARGEST, CHEAP_ROWS.get(device.type, 1) // rows)
    return window if window >= SMALLEST else 1


@dataclass(frozen=True)
class Windows:
    """codes_BN, int64, and how many steps were taken, that of the prefix apart."""

    codes_BN: Tensor
    steps: int


def sample_windows(draw: Draw, window: int) -> Windows:
    """All tokens of the samples, `window` of them guessed and run in each step."""
    state, steps = _State(draw, window), 0
    while state.unfinished():
        state.step()
        steps += 1
    return Windows(state.seen_BX[:, 1 : draw.tokens + 1], steps)


class _State:
    """Tokens and guesses of all samples; `first_B` is each sample's first token not yet final.

    seen_BX  the start of the image, then tokens and guesses: what stands at X is seen by token X
    """

    def __init__(self, draw: Draw, window: int) -> None:
        self.draw, self.window = draw, window
        self.caches = draw.prefill(window)
        device, samples = draw.text_BT.device, len(draw.text_BT)
        codes = draw.model.config.transformer.codebook_size
        spare = torch.full((samples, 2 * window), FREE, device=device)
        self.kept_BX = torch.cat([draw.kept_BN, spare], dim=1)
        start_B1 = torch.full_like(spare[:, :1], draw.model.start)
        self.seen_BX = torch.cat([start_B1, self.kept_BX.clamp(min=0)], dim=1)
        self.first_B = torch.full((samples,), draw.prefix, device=device)
        self.ahead_W = torch.arange(window, device=device)
        self.noise_BWK = torch.zeros(samples, window, codes, device=device)
        self._guess(self.first_B, self.first_B, None)

    def unfinished(self) -> bool:
        return bool((self.first_B < self.draw.tokens).any())

    def step(self) -> None:
        at_BW = self.first_B[:, None] + self.ahead_W
        logits_BWK = self.draw.logits(self.seen_BX.gather(1, at_BW), self.caches, self.first_B)
        noise_BWK = self.noise_BWK.take_along_dim((at_BW % self.window)[:, :, None], dim=1)
        kept_BW = self.kept_BX.gather(1, at_BW)
        chosen_BW = choose(logits_BWK, noise_BWK, self.draw.sampling)
        chosen_BW = torch.where(kept_BW == FREE, chosen_BW, kept_BW)
        right_BW = chosen_BW == self.seen_BX.gather(1, at_BW + 1)
        final_B = 1 + right_BW[:, :-1].long().cumprod(dim=1).sum(dim=1)
        self.seen_BX.scatter_(1, at_BW + 1, chosen_BW)
        before_B, self.first_B = self.first_B, (self.first_B + final_B).clamp(max=self.draw.tokens)
        self._guess(before_B + self.window, self.first_B, logits_BWK)

    def _guess(self, known_B: Tensor, first_B: Tensor, logits_BWK: Tensor | None) -> None:
        """Noise and guesses of what enters the window: from `known_B` to the window's end.

        A guess is what a token's own noise makes of the logits of the last token of the window
        before: of four rules tried, the one that is right most often (docs/log.md).
        """
        at_BW = first_B[:, None] + self.ahead_W
        sample_M, w_M = ((at_BW >= known_B[:, None]) & (at_BW < self.draw.tokens)).nonzero().T
        position_M = at_BW[sample_M, w_M]
        noise_MK = self.draw.noise(sample_M, position_M)
        self.noise_BWK[sample_M, position_M % self.window] = noise_MK
        guess_M = noise_MK.argmax(dim=-1)
        if logits_BWK is not None:
            guess_M = choose(logits_BWK[sample_M, -1], noise_MK, self.draw.sampling)
        kept_M = self.kept_BX[sample_M, position_M]
        self.seen_BX[sample_M, position_M + 1] = torch.where(kept_M == FREE, guess_M, kept_M)
