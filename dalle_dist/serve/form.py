"""What a request asks for: every field checked before the request waits.

Shape suffixes: G tokens per side.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from dalle_dist.config import SamplingConfig
from dalle_dist.config.root import keys_of
from dalle_dist.data.augment import centre
from dalle_dist.errors import UserError
from dalle_dist.generate.completion import first_rows, white_tokens
from dalle_dist.generate.generator import Generator
from dalle_dist.generate.request import Request, Settings
from dalle_dist.generate.sampling_options import Sampling
from dalle_dist.serve.limits import MOST_SEED, Limits, Refusal
from dalle_dist.serve.uploads import image_of

SAMPLING = tuple(name for name, *_ in keys_of(SamplingConfig))
FIELDS = {"prompt", "n", "seed", "image", "rows", "mask", *SAMPLING}


@dataclass(frozen=True)
class Completion:
    """What a completion keeps, and of what.

    square  the image's centred square at the model's size: the whole may be a thousand times larger
    option  what the command line would be given for it
    """

    square: Image.Image
    keep_GG: Tensor
    option: tuple[str, str]


@dataclass(frozen=True)
class Asked:
    """`n` images of a prompt."""

    prompt: str
    n: int
    seed: int
    sampling: Sampling
    completion: Completion | None = None


def asked(body: bytes, generator: Generator, limits: Limits) -> Asked:
    """A request's body, a JSON object, as what it asks for.

    The model is not run; only sizes and defaults of the generator are read.

    Raises:
        Refusal: a sentence that names the field.
    """
    fields = _fields(body)
    try:
        return Asked(
            _prompt(fields, limits),
            _integer(fields, "n", 1, 1, limits.images),
            _integer(fields, "seed", 0, 0, MOST_SEED),
            Sampling.of(generator.config.sampling, **_sampling(fields)),
            _completion(fields, generator, limits),
        )
    except UserError as error:
        # Errors name the command line's flags; the page has fields.
        raise Refusal(400, re.sub(r"^--(?:keep-)?", "", str(error))) from None


def options_of(wanted: Asked, generator: Generator) -> list[str]:
    """What the command line is given for the same images, from `-n` on."""
    words = ["-n", str(wanted.n), "--seed", str(wanted.seed)]
    own, defaults = asdict(wanted.sampling), asdict(generator.config.sampling)
    for name in SAMPLING:
        if own[name] != defaults[name]:
            words += [f"--{name.replace('_', '-')}", str(own[name])]
    if generator.precision != "fp32":
        words += ["--precision", generator.precision]
    return words if wanted.completion is None else [*wanted.completion.option, *words]


def _fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "the request is not JSON") from None
    if not isinstance(fields, dict):
        raise Refusal(400, "the request is not a JSON object")
    for name in fields.keys() - FIELDS:
        raise Refusal(400, f"{name[:40]!r} is not a field; there are {', '.join(sorted(FIELDS))}")
    return {name: value for name, value in fields.items() if value is not None}


def _prompt(fields: dict[str, Any], limits: Limits) -> str:
    prompt = fields.get("prompt", "")
    if isinstance(prompt, str) and len(prompt) > limits.prompt:
        raise Refusal(400, f"prompt: has more than {limits.prompt:,} characters")
    return Request([prompt], 1, Settings(0, Sampling())).prompts[0]


def _integer(fields: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = fields.get(name, default)
    if type(value) is not int:
        raise Refusal(400, f"{name}: {_shown(value)} is not an integer")
    if not low <= value <= high:
        raise Refusal(400, f"{name}: {_shown(value)} is not in {low} to {high}")
    return value


def _sampling(fields: dict[str, Any]) -> dict[str, Any]:
    given = {name: fields[name] for name in SAMPLING if name in fields}
    for name, value in given.items():
        if isinstance(value, (bool, list, dict)) or len(str(value)) > 40:
            raise Refusal(400, f"{name}: {_shown(value)} is not a setting")
    return given


def _completion(fields: dict[str, Any], generator: Generator, limits: Limits) -> Completion | None:
    parts = fields.keys() & {"rows", "mask"}
    if "image" not in fields:
        for name in parts:
            raise Refusal(400, f"{name}: needs an image")
        return None
    if len(parts) != 1:
        raise Refusal(400, "an image needs either rows or a mask, which say what is kept")
    image = image_of("image", fields["image"], limits.pixels)
    tokenizer = generator.image_tokenizer
    square = centre(image, tokenizer.image_size)
    if "rows" in fields:
        rows = _integer(fields, "rows", 1, 1, tokenizer.grid - 1)
        return Completion(square, first_rows(tokenizer, rows), ("--rows", str(rows)))
    mask = image_of("mask", fields["mask"], limits.pixels)
    keep_GG = white_tokens(tokenizer, image.size, mask)
    return Completion(square, keep_GG, ("--keep-mask", "mask.png"))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
