"""From prompts to images: a loaded release that generates.

from dalle_dist import Generator
generator = Generator.load("runs/demo/release")
generator.generate("a red heart", n=8)[0].image.save("heart.png")
"""

from __future__ import annotations

import hashlib
import numbers
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dalle_dist.checkpoint.release import load_release
from dalle_dist.choices import GuidanceSchedule
from dalle_dist.config import Config
from dalle_dist.data.labelled_grid import to_image
from dalle_dist.distributed.process_group import device_of
from dalle_dist.errors import UserError
from dalle_dist.generate.sampler import sample_codes, warn_if_never_empty
from dalle_dist.generate.sampling_options import Sampling
from dalle_dist.image_tokenizer.protocol import ImageTokenizer
from dalle_dist.text_tokenizer.protocol import TextTokenizer
from dalle_dist.transformer.model import Transformer


@dataclass(frozen=True)
class GeneratedImage:
    """An image and all that it depends on, the model apart.

    `generate(prompt, n=index + 1, seed=seed, ...)[index]` generates it again.
    """

    prompt: str
    index: int  # among the images of this prompt
    seed: int  # of the call; `sample_seed` makes the image's own of it
    image: Image.Image
    codes_N: Tensor
    sampling: Sampling


class Generator:
    """A transformer, and the tokenizers of text and image that it was trained with."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
        config: Config,
        fingerprint: str = "",
    ) -> None:
        self.model, self.tokenizer, self.image_tokenizer = model, tokenizer, image_tokenizer
        self.config, self.fingerprint = config, fingerprint

    @classmethod
    def load(cls, release: str | os.PathLike[str], device: str = "auto") -> Generator:
        """Read a release folder, local or remote.

        `device` "auto" is the GPU where there is one. Raises CheckpointError, or ConfigError when a
        GPU was granted that torch does not see.
        """
        parts = load_release(release, device_of() if device == "auto" else device)
        return cls(
            parts.transformer,
            parts.tokenizer,
            parts.image_tokenizer,
            parts.config,
            parts.fingerprint,
        )

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        guidance_schedule: GuidanceSchedule | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> list[GeneratedImage]:
        """`n` images per prompt, prompt by prompt.

        Sampling options that are None are those of the release (section `sampling` of its config).
        An image depends on (seed, prompt, its index) and on them, not on what is generated beside
        it. Prompts longer than the text block are cut, with a warning; so is there one for guidance
        of a model that was trained without empty captions.

        Raises:
            UserError: an option out of its range, or an empty prompt.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        _check_prompts(prompts)
        _check_numbers(n, seed, batch_size)
        n, seed = int(n), int(seed)
        sampling = Sampling.of(
            self.config.sampling,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance=guidance,
            guidance_schedule=guidance_schedule,
        )
        warn_if_never_empty(self.config, sampling)
        texts = {prompt: self._text(prompt) for prompt in prompts}
        wanted = [(prompt, index) for prompt in prompts for index in range(n)]
        made: list[GeneratedImage] = []
        for start in range(0, len(wanted), batch_size):
            part = wanted[start : start + batch_size]
            seeds = [sample_seed(seed, prompt, index) for prompt, index in part]
            codes_BN = sample_codes(
                self.model,
                torch.stack([texts[prompt] for prompt, _ in part]),
                seeds,
                sampling,
            )
            images = zip(part, self._decode(codes_BN), codes_BN.cpu(), strict=True)
            made += [
                GeneratedImage(prompt, index, seed, image, codes_N, sampling)
                for (prompt, index), image, codes_N in images
            ]
        return made

    def _text(self, prompt: str) -> Tensor:
        """The prompt's tokens_T on the model's device."""
        length = self.config.transformer.text_tokens
        ids, cut = self.tokenizer.encode_padded(prompt, length)
        if cut:
            warnings.warn(f"prompt cut to {length} tokens: {prompt}", stacklevel=3)
        return torch.tensor(ids, device=next(self.model.parameters()).device)

    def _decode(self, codes_BN: Tensor) -> Iterator[Image.Image]:
        return map(to_image, self.image_tokenizer.decode(codes_BN))


def sample_seed(seed: int, prompt: str, index: int) -> int:
    """32 bits that differ from prompt to prompt and from image to image."""
    digest = hashlib.blake2b(f"{seed}\n{prompt}\n{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def _check_prompts(prompts: list[str]) -> None:
    for prompt in prompts or [""]:
        if not isinstance(prompt, str):
            raise UserError(f"a prompt is not text: {prompt!r}; say what to generate")
        if not prompt.strip():
            raise UserError("a prompt is empty; say what to generate")
        if not prompt.isascii() and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise UserError(f"a prompt is not text: {prompt!r}; write it in UTF-8")


def _check_numbers(n: int, seed: int, batch_size: int) -> None:
    for name, value in {"-n": n, "--seed": seed, "--batch-size": batch_size}.items():
        if not isinstance(value, numbers.Integral):
            raise UserError(f"{name}: {value!r} is not an integer")
        if value < 1 and name != "--seed":
            raise UserError(f"{name}: {value} is below 1")
