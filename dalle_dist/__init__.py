"""dalle-dist: train DALL-E from a laptop's CPU to a cluster, with the same commands.

load(release)                  a Generator: the model of a release folder, ready to sample
ImageTokenizer.load(release)   images to codes and back
load_config(preset)            a checked Config from a preset or a YAML file
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle_dist.checkpoint.any_image_tokenizer import ImageTokenizer
    from dalle_dist.config import Config
    from dalle_dist.config import load as load_config
    from dalle_dist.dvae.model import DVAE
    from dalle_dist.generate.generator import GeneratedImage, Generator, load
    from dalle_dist.text_tokenizer.bpe import Tokenizer
    from dalle_dist.transformer.model import Transformer

__version__ = "0.1.0"
__all__ = [
    "DVAE",
    "Config",
    "GeneratedImage",
    "Generator",
    "ImageTokenizer",
    "Tokenizer",
    "Transformer",
    "__version__",
    "load",
    "load_config",
]

# Where each name lives. They are fetched when first asked for: the command line imports this
# package, and its --help must not wait for torch.
_HOMES = {
    "DVAE": "dvae.model.DVAE",
    "Config": "config.Config",
    "GeneratedImage": "generate.generator.GeneratedImage",
    "Generator": "generate.generator.Generator",
    "Tokenizer": "text_tokenizer.bpe.Tokenizer",
    "Transformer": "transformer.model.Transformer",
    "ImageTokenizer": "checkpoint.any_image_tokenizer.ImageTokenizer",
    "load": "generate.generator.load",
    "load_config": "config.load",
}


if not TYPE_CHECKING:  # or else type checkers would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            near = difflib.get_close_matches(name, __dir__(), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
        module, _, attribute = _HOMES[name].rpartition(".")
        value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOMES.keys())
