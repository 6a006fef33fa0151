"""Architectures of stage 2 by name, the values of the config's `transformer.architecture`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import TypeVar

import torch
from torch import Tensor, nn

from dalle_dist.config import Config
from dalle_dist.errors import ConfigError
from dalle_dist.transformer.protocol import TextImageTransformer

Model = TypeVar("Model", bound=nn.Module)

# For `pkgutil.resolve_name`: imported when first asked for.
ARCHITECTURES = {
    "paper": "dalle_dist.transformer.model:Transformer",
    "rudalle": "dalle_dist.interop.rudalle:RuDALLE",
    "dalle-pytorch": "dalle_dist.interop.dalle_pytorch.model:DALLEPytorch",
    "mindalle": "dalle_dist.interop.mindalle:MinDALLE",
}


def transformer_class(config: Config) -> type[TextImageTransformer]:
    """Raises ConfigError: `interop.options` for the paper's own model, which has none."""
    name = config.transformer.architecture
    if name == "paper" and config.interop.options:
        raise ConfigError("interop.options: only for an imported transformer.architecture")
    found: type[TextImageTransformer] = resolve_name(ARCHITECTURES[name])
    return found


def build_transformer(config: Config) -> TextImageTransformer:
    """The model that a config describes. Raises ConfigError: options that are not its own."""
    return transformer_class(config)(config)


def with_weights(build: Callable[[], Model], weights: Mapping[str, Tensor]) -> Model:
    """A model with these very tensors for weights, in evaluation mode; made without memory."""
    with torch.device("meta"):
        model = build()
    model.load_state_dict(weights, assign=True)
    return model.eval()
