"""From prompts to images: a loaded release that generates.

from dalle_dist import Generator
generator = Generator.load("runs/demo/release")
generator.generate("a red heart", n=8)[0].image.save("heart.png")

Shape suffixes: B samples, N image tokens, T text positions.
"""

from __future__ import annotations

import numbers
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from dalle_dist.checkpoint.release import load_release
from dalle_dist.choices import GeneratePrecision
from dalle_dist.config import Config
from dalle_dist.data.labelled_grid import to_image
from dalle_dist.distributed.process_group import device_of
from dalle_dist.errors import UserError
from dalle_dist.generate.completion import kept_region, kept_rows
from dalle_dist.generate.request import Entry, Kept, Request, Settings
from dalle_dist.generate.sampler import sample_codes, warn_if_never_empty
from dalle_dist.generate.sampling_options import Sampling, SamplingOptions
from dalle_dist.generate.windowed import best_window
from dalle_dist.image_tokenizer.protocol import ImageTokenizer
from dalle_dist.text_tokenizer.protocol import TextTokenizer
from dalle_dist.transformer.protocol import TextImageTransformer

if TYPE_CHECKING:
    from typing_extensions import Unpack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class GeneratedImage:
    """An image and all that it depends on, the model apart.

    `generate(prompt, n=index + 1, seed=seed, ...)[index]` generates it again.
    """

    prompt: str
    index: int  # among the images of this prompt
    image: Image.Image
    codes_N: Tensor
    settings: Settings

    @property
    def seed(self) -> int:
        return self.settings.seed

    @property
    def sampling(self) -> Sampling:
        return self.settings.sampling

    @property
    def entry(self) -> Entry:
        """What a manifest says of it."""
        return self.settings.entry(self.prompt, self.index)


class Generator:
    """A transformer, and the tokenizers of text and image that it was trained with."""

    def __init__(
        self,
        model: TextImageTransformer,
        tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
        config: Config,
        fingerprint: str = "",
        precision: GeneratePrecision = "fp32",
    ) -> None:
        self.model, self.tokenizer, self.image_tokenizer = model, tokenizer, image_tokenizer
        self.config, self.fingerprint, self.precision = config, fingerprint, precision
        # What the paper keeps in fp32 in training stays so: embeddings, unembeddings, the stream.
        model.blocks.to(DTYPES[precision])

    @property
    def transformer(self) -> TextImageTransformer:
        """The model, frozen."""
        return self.model

    @classmethod
    def load(
        cls,
        release: str | os.PathLike[str],
        device: torch.device | str = "auto",
        precision: GeneratePrecision = "fp32",
    ) -> Generator:
        """Read a release folder, local or remote.

        `device` "auto" is the GPU where there is one; `precision` is that of the resblocks. Raises
        CheckpointError, or ConfigError when a GPU was granted that torch does not see.
        """
        if precision not in DTYPES:
            raise UserError(f"--precision: {precision!r} is not one of {', '.join(DTYPES)}")
        parts = load_release(release, device_of() if device == "auto" else device)
        return cls(
            parts.transformer,
            parts.tokenizer,
            parts.image_tokenizer,
            parts.config,
            parts.fingerprint,
            precision,
        )

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        window: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[GeneratedImage]:
        """`n` images per prompt, prompt by prompt.

        The sampling options are `temperature`, `top_k`, `top_p`, `guidance` and
        `guidance_schedule`; those that are None or left out are those of the release (section
        `sampling` of its config). An image depends on (seed, prompt, its index) and on them, not
        on what is generated beside it. A prompt that stands there twice gets 2 n different
        images. Prompts longer than the text block are cut, with a warning; so is there one for
        guidance of a model that was trained without empty captions.

        Args:
            window: tokens that are guessed and run at once, which gives the same images sooner;
                1: one by one; None: what is quickest for `batch_size`.

        Raises:
            UserError: an option out of its range, or an empty prompt.
        """
        return self._generate(prompts, n, seed, batch_size, window, None, sampling)

    def complete(
        self,
        image: Image.Image,
        prompts: str | Sequence[str],
        *,
        rows: int | None = None,
        keep_mask: Image.Image | None = None,
        n: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        window: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[GeneratedImage]:
        """As `generate`, but the tokens of a part of `image` are kept and the others follow them.

        Args:
            rows: keep the first rows of tokens (paper 3.3).
            keep_mask: keep the tokens whose pixels are all white in it. Tokens look at those above
                them and to their left: what is kept below them they do not know.

        Raises:
            UserError: as `generate`; not one of `rows` and `keep_mask`, or one that does not fit.
        """
        kept = self.kept(image, rows, keep_mask)
        return self._generate(prompts, n, seed, batch_size, window, kept, sampling)

    def kept(self, image: Image.Image, rows: int | None, keep_mask: Image.Image | None) -> Kept:
        """The tokens that `complete` keeps; its errors."""
        if (rows is None) == (keep_mask is None):
            raise UserError("a completion keeps either --rows or a --keep-mask")
        if rows is not None:
            return kept_rows(self.image_tokenizer, image, rows)
        assert keep_mask is not None
        return kept_region(self.image_tokenizer, image, keep_mask)

    def settings(
        self, seed: int, kept: Kept | None = None, **sampling: Unpack[SamplingOptions]
    ) -> Settings:
        """All that images of a call depend on; options as in `generate`, and its errors."""
        chosen = Sampling.of(self.config.sampling, **sampling)
        warn_if_never_empty(self.config, chosen)
        return Settings(int(seed), chosen, self.fingerprint, self.precision, kept)

    def codes(
        self, wanted: Sequence[tuple[str, int]], settings: Settings, window: int | None = None
    ) -> Tensor:
        """codes_BN, int64, on the model's device, of one batch of (prompt, index)."""
        texts = {prompt: self._text(prompt) for prompt, _ in wanted}
        kept_BN = None
        if settings.kept is not None:
            codes_N = settings.kept.codes_N.to(self._device())
            kept_BN = codes_N.expand(len(wanted), -1)
        if window is None:
            window = best_window(self._device(), len(wanted), settings.sampling)
        return sample_codes(
            self.model,
            torch.stack([texts[prompt] for prompt, _ in wanted]),
            [settings.sample_seed(prompt, index) for prompt, index in wanted],
            settings.sampling,
            kept_codes=kept_BN,
            window=window if window > 1 else None,
        )

    def images(self, codes_BN: Tensor) -> list[Image.Image]:
        """What the image tokenizer makes of codes."""
        return [to_image(image_CHW) for image_CHW in self.image_tokenizer.decode(codes_BN)]

    def _generate(
        self,
        prompts: str | Sequence[str],
        n: int,
        seed: int,
        batch_size: int,
        window: int | None,
        kept: Kept | None,
        sampling: SamplingOptions,
    ) -> list[GeneratedImage]:
        check_numbers(n=n, seed=seed, batch_size=batch_size, window=window)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        settings = self.settings(seed, kept, **sampling)
        request = Request(prompts, int(n), settings)
        made: list[GeneratedImage] = []
        for start in range(0, len(request), batch_size):
            stop = min(start + batch_size, len(request))
            wanted = [request[number] for number in range(start, stop)]
            codes_BN = self.codes(wanted, settings, window)
            made += [
                GeneratedImage(prompt, index, image, codes_N, settings)
                for (prompt, index), image, codes_N in zip(
                    wanted, self.images(codes_BN), codes_BN.cpu(), strict=True
                )
            ]
        return made

    def _text(self, prompt: str) -> Tensor:
        """The prompt's tokens_T on the model's device."""
        length = self.config.transformer.text_tokens
        ids, cut = self.tokenizer.encode_padded(prompt, length)
        if cut:
            warnings.warn(f"prompt cut to {length} tokens: {prompt}", stacklevel=3)
        return torch.tensor(ids, device=self._device())

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def load(
    release: str | os.PathLike[str],
    device: torch.device | str = "auto",
    precision: GeneratePrecision = "fp32",
) -> Generator:
    """A model ready to sample, from a release folder, local or remote; as `Generator.load`."""
    return Generator.load(release, device, precision)


def check_numbers(**numbers_given: Any) -> None:
    """Raises UserError, naming the command line's flag: not an integer, or below 1."""
    for name, value in numbers_given.items():
        flag = "-n" if name == "n" else f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if not isinstance(value, numbers.Integral):
            raise UserError(f"{flag}: {value!r} is not an integer")
        if value < 1 and name != "seed":
            raise UserError(f"{flag}: {value} is below 1")
