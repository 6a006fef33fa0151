"""NVIDIA apex, where a user built it and asks for it.

The package that an index calls `apex` is another program, so the name alone proves nothing: the
class itself is looked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dalle_dist.errors import ConfigError


def fused_adam() -> type[Any]:
    """The class apex.optimizers.FusedAdam. Raises ConfigError where there is none."""
    return _find("apex.optimizers", "FusedAdam")


def fused_layer_norm() -> type[Any]:
    """The class apex.normalization.FusedLayerNorm. Raises ConfigError where there is none."""
    return _find("apex.normalization", "FusedLayerNorm")


class FusedUpdate:
    """One FusedAdam that updates one parameter at a time, on state that another optimizer owns.

    FusedAdam counts steps by group, ours by parameter; and DeepSpeed changes the groups between
    calls. So each call gets a group of its own.
    """

    def __init__(self) -> None:
        self._class = fused_adam()
        self._inner: Any = None

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        step: int,
        group: Mapping[str, Any],
    ) -> None:
        """Step number `step` (from 1) of `param` and its moments `state`, by `group`'s options.

        Raises:
            ValueError: the gradient's dtype is not the parameter's; FusedAdam would misread it.
        """
        if grad.dtype != param.dtype:
            raise ValueError(f"grad: dtype {grad.dtype} is not {param.dtype}, as apex needs")
        if self._inner is None:
            self._inner = self._class([param], adam_w_mode=True)
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        options |= {"bias_correction": True, "step": step - 1}
        self._inner.param_groups = [{"params": [param], **options}]
        self._inner.state = {param: state}
        param.grad = grad
        self._inner.step()


def _find(module: str, name: str) -> type[Any]:
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # the other package's import may fail in any way
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"apex: {module}.{name} cannot be imported ({reason}); build NVIDIA apex from its "
            "sources (`pip install apex` is another program), or do without it"
        ) from error
    return found
