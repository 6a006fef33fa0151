"""What a call asks for: images of prompts, and all that each of them depends on.

Shape suffixes: N image tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dalle_dist.errors import UserError
from dalle_dist.generate.sampling_options import Sampling

Entry = dict[str, Any]  # of the manifest
MOST_CANDIDATES = 2**20  # of one prompt


@dataclass(frozen=True)
class Kept:
    """Tokens of a given image that a completion keeps.

    codes_N  int64, `sampler.FREE` where one is to be sampled
    digest   16 hex digits of them
    """

    codes_N: Tensor
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        data = self.codes_N.cpu().numpy().astype("<i8").tobytes()
        object.__setattr__(self, "digest", hashlib.blake2b(data, digest_size=8).hexdigest())


@dataclass(frozen=True)
class Settings:
    """All that an image depends on, its prompt and index apart.

    seed       of the call; `sample_seed` makes each image's own of it
    model      fingerprint of the transformer
    precision  in which it computes
    """

    seed: int
    sampling: Sampling
    model: str = ""
    precision: str = "fp32"
    kept: Kept | None = None

    def entry(self, prompt: str, index: int) -> Entry:
        """What the manifest says of an image."""
        kept = {} if self.kept is None else {"kept": self.kept.digest}
        return {
            "prompt": prompt,
            "index": index,
            "seed": self.seed,
            "model": self.model,
            "precision": self.precision,
            **kept,
            **dataclasses.asdict(self.sampling),
        }

    def sample_seed(self, prompt: str, index: int) -> int:
        return sample_seed(self.seed, prompt, index)


def sample_seed(seed: int, prompt: str, index: int) -> int:
    """64 bits that differ from prompt to prompt and from image to image."""
    digest = hashlib.blake2b(f"{seed}\n{prompt}\n{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


class Request:
    """Candidates of prompts, numbered prompt by prompt: a sequence of (prompt, index).

    A prompt that stands there twice gets as many images more, not the same ones again.

    Raises:
        UserError: no prompt, an empty one, one that is no text, or too many candidates of one.
    """

    def __init__(self, prompts: Sequence[str], candidates: int, settings: Settings) -> None:
        _check(prompts)
        self.prompts, self.candidates, self.settings = tuple(prompts), candidates, settings
        self._before, seen = list[int](), Counter[str]()
        for prompt in self.prompts:
            self._before.append(seen[prompt] * candidates)
            seen[prompt] += 1
        if max(seen.values()) * candidates > MOST_CANDIDATES:
            raise UserError(f"-n: more than {MOST_CANDIDATES:,} images of one prompt")

    def __len__(self) -> int:
        return len(self.prompts) * self.candidates

    def __getitem__(self, number: int) -> tuple[str, int]:
        prompt, index = divmod(number, self.candidates)
        return self.prompts[prompt], self._before[prompt] + index

    def entry(self, number: int) -> Entry:
        return self.settings.entry(*self[number])

    def digest(self, numbers: range) -> str:
        """32 hex digits of all that these candidates depend on."""
        wanted = [self[number] for number in numbers]
        text = json.dumps([self.settings.entry("", 0), wanted], sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _check(prompts: Sequence[str]) -> None:
    for prompt in prompts or [""]:
        if not isinstance(prompt, str):
            raise UserError(f"a prompt is not text: {prompt!r}; say what to generate")
        if not prompt.strip():
            raise UserError("a prompt is empty; say what to generate")
        if not prompt.isascii() and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise UserError(f"a prompt is not text: {prompt!r}; write it in UTF-8")
