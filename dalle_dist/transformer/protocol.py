"""What every architecture of stage 2 gives to training and to sampling.

Shape suffixes: B batch, C captions, M targets that count, T text tokens, N image tokens, V text
classes, K codebook entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dalle_dist.config import Config
from dalle_dist.transformer.initial import Initial
from dalle_dist.transformer.loss import Loss, cross_entropy_sum

Predictions = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


class TextImageTransformer(nn.Module, ABC):
    """Text and image tokens to the loss of predicting each from those before it.

    config  of the release or run
    blocks  the layers, which alone are cast to 16 bits
    start   the id that stands in `step` for the input of the first image token
    """

    config: Config
    blocks: nn.ModuleList
    start: int

    def forward(self, text_BT: Tensor, codes_BN: Tensor) -> Loss:
        """Captions (ids, PAD after the text) and codes, int64, to the sums of both losses.

        Raises:
            ValueError: another shape or dtype. Values are not looked at, which would hold up
                training; `logits` and `prefill` do.
        """
        text, image = self.predictions(text_BT, codes_BN)
        return Loss(*cross_entropy_sum(*text), *cross_entropy_sum(*image))

    @abstractmethod
    def predictions(
        self,
        text_BT: Tensor,
        codes_BN: Tensor,
        seen_BN: Tensor | None = None,
        counted_M: Tensor | None = None,
    ) -> Predictions:
        """(logits_MV, targets_M) of the text, then of the image; arguments as those of `forward`.

        M are the targets that count: pads after a caption's first do not.

        Args:
            seen_BN: what stands at the positions of the codes when later ones are predicted; None:
                the codes themselves.
            counted_M: `layout.counted_indices` of the captions, which spares the host a wait for
                the device; None: looked for here.
        """

    @abstractmethod
    def prefill(
        self,
        text_CT: Tensor,
        samples: Sequence[int],
        prefix_CN: Tensor | None = None,
        window: int | None = None,
    ) -> list[Any]:
        """Run captions through all layers; the caches then take the image tokens that follow.

        `samples` images are drawn from each caption; those of a caption are neighbours along the
        B of `step`.

        Args:
            prefix_CN: the first codes of each caption's images, int64, run as one block; `step`
                goes on at the position after them, with the last of them as its input.
            window: tokens that `step` takes at once, each sample at a position of its own; None:
                one token of all samples, at one position.

        Raises:
            ValueError: another shape or dtype than the model's captions, an id that is not in its
                vocabulary, or not one number of samples for each caption.
        """

    @abstractmethod
    def step(self, held_BN: Tensor, caches: list[Any], at: int | Tensor) -> Tensor:
        """fp32 logits_BNK of the next image tokens, whose inputs are `held_BN`.

        The input of position 0 is `start`, of later ones the code before theirs.

        Args:
            held_BN: int64, N the window that the caches were made for, or 1.
            caches: those of `prefill`.
            at: without a window the position of all, also as a tensor of no dimension; with one
                the first position of each sample, int64 [B].
        """

    @abstractmethod
    def logits(self, text_BT: Tensor, codes_BN: Tensor) -> tuple[Tensor, Tensor]:
        """All of (text_BTV, image_BNK), for tests and analysis.

        Raises:
            ValueError: another shape or dtype, or an id that is not in its vocabulary.
        """

    def initials(self) -> dict[str, Initial] | None:
        """What each parameter starts from, by name; None: this architecture draws its own."""
        return None

    @abstractmethod
    def attention_size(self) -> int:
        """Channels times (query, key) pairs that the masks allow, of all layers."""
