"""What the transformers of other programs have in common with ours, seen from outside.

    positions  [start] t1 ... tT | z1 ... z(N-1)      each predicts what stands at the next one

The start token is there or not, as the program has it; without one nothing predicts t1.

Shape suffixes: B batch, C captions, M targets that count, L text positions (T, or T + 1 with the
start token), T text tokens, N image tokens, S = L + N - 1 positions, W width, V text classes, K
codebook entries, H heads, D head width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dalle_dist.config import Config
from dalle_dist.errors import ConfigError
from dalle_dist.interop.place import Memory, Place
from dalle_dist.transformer import checks
from dalle_dist.transformer.blocks import Resblock
from dalle_dist.transformer.layout import counted_text_targets
from dalle_dist.transformer.protocol import Predictions, TextImageTransformer


class InteropTransformer(TextImageTransformer):
    """A subclass gives embeddings, layers (`blocks`), masks and logits.

    A layer is called as `layer(x_BNW, place)`; all that it knows of other positions than those of
    its x comes from `place` (`interop/place.py`), so that one program serves training and sampling.

    starts       whether a start token stands before the text
    text_length  text positions, L
    positions    all positions, S
    """

    starts: ClassVar[bool]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.start = config, config.transformer.codebook_size
        self.text_length = config.transformer.text_tokens + self.starts
        self.positions = self.text_length + config.transformer.image_tokens - 1
        self._seen: dict[tuple[int, torch.device], Tensor] = {}

    @abstractmethod
    def embed_text(self, text_BT: Tensor) -> Tensor:
        """x_BLW of ids with PAD after the text; the program's own start token and pads put in."""

    @abstractmethod
    def embed_codes(self, codes_BN: Tensor, at_BN: Tensor) -> Tensor:
        """x_BNW of codes at raster positions `at_BN`, which broadcasts against the codes."""

    @abstractmethod
    def mask(self, layer: int) -> Tensor | None:
        """bool [S, S] on the CPU, query by key: what a layer may look at; None: all before it."""

    @abstractmethod
    def text_logits(self, x_MW: Tensor) -> Tensor:
        """fp32 logits_MV from the last layer's output, final norms included."""

    @abstractmethod
    def image_logits(self, x_BNW: Tensor) -> Tensor:
        """fp32 logits_BNK likewise."""

    def text_targets(self, text_BT: Tensor) -> Tensor:
        """The classes of `text_logits` that ids stand for, by their positions."""
        return text_BT

    def attention_width(self) -> int:
        """Channels of all heads of a layer."""
        return self.config.transformer.width

    def predictions(
        self,
        text_BT: Tensor,
        codes_BN: Tensor,
        seen_BN: Tensor | None = None,
        counted_M: Tensor | None = None,  # which count is the architecture's own affair
    ) -> Predictions:
        checks.codes_fit(codes_BN, len(text_BT), self.config)
        x_BTW, x_BNW = self._outputs(text_BT, codes_BN if seen_BN is None else seen_BN)
        counted_BT = counted_text_targets(text_BT)
        if not self.starts:
            counted_BT[:, 0] = False
        text = self.text_logits(x_BTW[counted_BT]), self.text_targets(text_BT)[counted_BT]
        return text, (self.image_logits(x_BNW).flatten(0, 1), codes_BN.flatten())

    def logits(self, text_BT: Tensor, codes_BN: Tensor) -> tuple[Tensor, Tensor]:
        """As of any transformer; those of the first text token mean nothing without a start."""
        checks.ids_fit("text", text_BT, self.config.tokenizer.vocab_size)
        checks.ids_fit("codes", codes_BN, self.config.transformer.codebook_size)
        x_BTW, x_BNW = self._outputs(text_BT, codes_BN)
        return self.text_logits(x_BTW), self.image_logits(x_BNW)

    def prefill(
        self,
        text_CT: Tensor,
        samples: Sequence[int],
        prefix_CN: Tensor | None = None,
        window: int | None = None,
    ) -> list[Any]:
        checks.text_fits(text_CT, self.config)
        checks.ids_fit("text", text_CT, self.config.tokenizer.vocab_size)
        if len(samples) != len(text_CT):
            raise ValueError(f"samples: {len(samples)} numbers for {len(text_CT)} captions")
        prefix_CN = text_CT[:, :0] if prefix_CN is None else prefix_CN
        x_CLW = self.embed_text(text_CT)
        # The last input is that of the step which follows.
        x_CSW = torch.cat([x_CLW, self._embedded(prefix_CN)], dim=1)[:, :-1]
        memories = [Memory(self.positions + (window or 1)) for _ in self.blocks]
        for layer, (block, memory) in enumerate(zip(self.blocks, memories, strict=True)):
            x_CSW = block(x_CSW, Place(self._seen_of(layer, x_CSW.device), None, memory))
        repeats_C = torch.tensor(samples, device=text_CT.device)
        memories[0].keep("last", x_CLW[:, -1:], None)
        for memory in memories:
            memory.repeat(repeats_C)
        return memories

    def step(self, held_BN: Tensor, caches: list[Any], at: int | Tensor) -> Tensor:
        ahead_N = torch.arange(held_BN.shape[1], device=held_BN.device)
        first_B1 = torch.as_tensor(at, device=held_BN.device).reshape(-1, 1)
        at_BN = (first_B1 + ahead_N).expand(len(held_BN), -1)
        x_BNW = self._held(held_BN, caches[0].kept["last"][:, :1], at_BN)
        for layer, (block, memory) in enumerate(zip(self.blocks, caches, strict=True)):
            seen = self._seen_of(layer, x_BNW.device)
            x_BNW = block(x_BNW, Place(seen, self.text_length - 1 + at_BN, memory))
        return self.image_logits(x_BNW)

    def attention_size(self) -> int:
        pairs = (int(self._dense(layer).sum()) for layer in range(len(self.blocks)))
        return self.attention_width() * sum(pairs)

    def _held(self, held_BN: Tensor, last_B1W: Tensor, at_BN: Tensor) -> Tensor:
        """The inputs of image positions: the last text position's, or the code before theirs."""
        codes_BN = held_BN.clamp(max=self.start - 1)
        raster_BN = (at_BN - 1).clamp(0, self.config.transformer.image_tokens - 1)
        return torch.where((at_BN == 0)[..., None], last_B1W, self.embed_codes(codes_BN, raster_BN))

    def _outputs(self, text_BT: Tensor, codes_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Of the last layer: x_BTW and x_BNW, each at the position that predicts its token."""
        checks.text_fits(text_BT, self.config)
        checks.codes_fit(codes_BN, len(text_BT), self.config)
        x_BSW = torch.cat([self.embed_text(text_BT), self._embedded(codes_BN[:, :-1])], dim=1)
        for layer, block in enumerate(self.blocks):
            place = Place(self._seen_of(layer, x_BSW.device))
            if self.config.train.checkpoint_activations and self.training:
                x_BSW = checkpoint(block, x_BSW, place, use_reentrant=False)
            else:
                x_BSW = block(x_BSW, place)
        text_BTW, image_BNW = x_BSW[:, : self.text_length - 1], x_BSW[:, self.text_length - 1 :]
        if not self.starts:
            text_BTW = torch.cat([torch.zeros_like(x_BSW[:, :1]), text_BTW], dim=1)
        return text_BTW, image_BNW

    def _embedded(self, codes_BN: Tensor) -> Tensor:
        return self.embed_codes(codes_BN, torch.arange(codes_BN.shape[1], device=codes_BN.device))

    def _dense(self, layer: int) -> Tensor:
        found = self.mask(layer)
        size = (self.positions, self.positions)
        return torch.ones(size, dtype=torch.bool, device="cpu").tril() if found is None else found

    def _seen_of(self, layer: int, device: torch.device) -> Tensor:
        if (layer, device) not in self._seen:
            self._seen[layer, device] = self._dense(layer).to(device)
        return self._seen[layer, device]


class Branch(Resblock):
    """A resblock x + inside(norm(x), place) of an imported layer; subclasses give `inside`."""

    def forward(self, x_BNW: Tensor, place: Place) -> Tensor:  # type: ignore[override]
        return x_BNW + self.branch(x_BNW, place)

    def branch(self, x_BNW: Tensor, place: Place) -> Tensor:
        """What is added to a stream, here to x itself."""
        return self.inside(self.norm(x_BNW), place)

    @abstractmethod
    def inside(self, h_BNW: Tensor, place: Place) -> Tensor:  # type: ignore[override]
        """What the block adds to the stream, from its normed inputs."""


def attend(q_BNHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, seen: Tensor) -> Tensor:
    """out_BND of all heads side by side; `seen` is `Place.seen`."""
    q_BHND, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BNHD, k_BSHD, v_BSHD))
    out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHSD, v_BHSD, attn_mask=seen)
    return out_BHND.transpose(1, 2).flatten(2)


def checked_options(config: Config, known: dict[str, Any]) -> dict[str, Any]:
    """The config's `interop.options`, which have exactly the keys of `known` and their types.

    Raises ConfigError: a key is missing, unknown, or of another type.
    """
    options = config.interop.options
    for key in sorted(options.keys() | known.keys()):
        name = f"interop.options.{key}"
        if key not in known:
            raise ConfigError(f"{name}: unknown; there are {', '.join(known)}")
        if key not in options:
            raise ConfigError(f"{name}: missing, which {config.transformer.architecture} needs")
        if type(options[key]) is not type(known[key]):
            kind = type(known[key]).__name__
            raise ConfigError(f"{name}: {options[key]!r} is not of type {kind}")
    return options
