"""dalle-dist: train DALL-E from a laptop's CPU to a cluster, with the same commands.

Generator.load(folder)   generates images for prompts from a release folder
load(folder)             all of a release folder: config, tokenizer, image tokenizer, transformer
load_config(preset)      a checked Config from a preset or a YAML file
load_image_tokenizer("dvae", folder)   the image tokenizer of a release folder alone
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle_dist.checkpoint.release import load_release as load
    from dalle_dist.config import Config
    from dalle_dist.config import load as load_config
    from dalle_dist.dvae.model import DVAE
    from dalle_dist.generate.generator import GeneratedImage, Generator
    from dalle_dist.image_tokenizer.registry import load_image_tokenizer
    from dalle_dist.text_tokenizer.bpe import Tokenizer
    from dalle_dist.transformer.model import Transformer

__version__ = "0.1.0"
__all__ = [
    "DVAE",
    "Config",
    "GeneratedImage",
    "Generator",
    "Tokenizer",
    "Transformer",
    "__version__",
    "load",
    "load_config",
    "load_image_tokenizer",
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
    "load": "checkpoint.release.load_release",
    "load_config": "config.load",
    "load_image_tokenizer": "image_tokenizer.registry.load_image_tokenizer",
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
